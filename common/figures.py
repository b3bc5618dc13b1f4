"""What all pictures have in common."""


def plain(text: str) -> str:
    """`text` as matplotlib is to be given it, so that it is shown as it stands: there dollars begin
    and end a formula."""
    return text.replace("$", r"\$")
