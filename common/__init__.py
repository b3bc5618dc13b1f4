"""What every part needs and no part owns: errors in one line, whole files, devices."""
