"""The ports through which a guest speaks to whoever runs it, beside its devices: how it ends, and its last words."""

from collections.abc import Callable

from lguestlib.runtime.machine import Outcome, PowerOff, Reboot

PORT_KEYBOARD = 0x64
KEYBOARD_RESET = 0xFE
"""A PC's keyboard controller pulses the reset line when this is written to its port."""

PORT_LAST_WORDS = 0xE9
"""Where a guest writes a line of last words, a character at a time."""

PORT_EXIT = 0xF4
"""Where a guest writes its verdict to switch the machine off."""

_LINE_MAX = 500


class GuestPorts:
    """Takes what is written there; *report* is given last words by the line."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._last_words = bytearray()

    def write(self, port: int, data: bytes) -> Outcome | None:
        """The guest writes *data* to *port*: how it ends by that, if it does."""
        if port == PORT_EXIT:
            return PowerOff(data[0])
        if port == PORT_KEYBOARD and data[0] == KEYBOARD_RESET:
            return Reboot()
        if port == PORT_LAST_WORDS:
            for character in data:
                if character == 0x0A or len(self._last_words) >= _LINE_MAX:
                    self._report(self._last_words.decode("latin-1"))
                    self._last_words.clear()
                else:
                    self._last_words.append(character)
        return None
