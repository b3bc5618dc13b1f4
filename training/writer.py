"""Writing files of tensors while training goes on."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Writer:
    """Writes files of tensors, one at a time: from a GPU out of a copy in pinned memory, on a
    thread of its own, since training can go on while some gigabytes go to a disk. A CPU's tensors
    change under a thread, so there it writes at once."""

    def __init__(self, device: str):
        self.behind = device == "cuda"
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def write(self, save: Callable[[Any], None], values: Any) -> None:
        """Calls `save` with `values`, tensors in dicts and lists, as they are now. What goes wrong
        on the thread is raised by the next call."""
        self.finish()
        if not self.behind:
            save(values)
            return
        ready = on_host(values)
        # Steps may change the tensors once the stream has passed this point, and not before.
        copied = torch.cuda.Event()
        copied.record()

        def work() -> None:
            copied.synchronize()  # the thread waits for the copies, training does not
            try:
                save(ready)
            except Exception as error:
                self.error = error  # an exception would end with its thread, unseen

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def finish(self) -> None:
        """Waits until all is written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error = self.error
            self.error = None  # it is told once
            raise error


def on_host(values: Any) -> Any:
    """Tensors of a GPU as copies in pinned memory, in the same dicts and lists; they are whole once
    the device got there."""
    if isinstance(values, dict):
        return {key: on_host(value) for key, value in values.items()}
    if isinstance(values, list):
        return [on_host(value) for value in values]
    return values.to("cpu", non_blocking=True, copy=True) if isinstance(values, Tensor) else values
