"""Checks whose absence changes nothing that shows, and why; a run takes them for accounted for."""

_SHORT_CUT = "a short cut: the way for every shape gives the same"
_UNCHANGED = "a short cut: what has not changed is checked again and gives the same"
_JUDGED_LATER = "a short cut: without it the shape is found not to be one below"
_FIRST_ONLY = "only the first element is used"
_LOOK = "it bounds how many flags are looked at: what comes of those behind is the same"
_WAITING = "those that wait still are resumed before any other is taken"
_TYPE = "it is there for the type alone: what follows would find the same"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("chain", "if len(self.readable) == 1:", "never len(self.readable) == 1"): _SHORT_CUT,
    ("chain", "if length <= 0:",
     "never length <= 0"): "the buffers behind the last byte add pieces of no length",
    ("split_device", "self._avail_flags = available[0:1]", "without the end 1"): _FIRST_ONLY,
    ("split_device", "self._avail_idx = available[1:2]", "without the end 2"): _FIRST_ONLY,
    ("split_device", 'self._used_flags = used[0:2].cast("H")', "without the end 2"): _FIRST_ONLY,
    ("split_device", 'self._used_idx = used[2:4].cast("H")', "without the end 4"): _FIRST_ONLY,
    ("split_device", "if three == chain.three:", "never three == chain.three"): _UNCHANGED,
    ("split_device", "if one == chain.one:", "never one == chain.one"): _UNCHANGED,
    ("split_device", "if not link & _NEXT_OR_INDIRECT:", "never not link & _NEXT_OR_INDIRECT"): _SHORT_CUT,
    ("split_device", "if link == row and head + 3 <= size:", "without link == row"): _JUDGED_LATER,
    ("split_device", "elif link & 0xFFFF == VRING_DESC_F_INDIRECT and length == _THREE_SIZE and indirect:",
     "link, not link & 0xFFFF"): _SHORT_CUT,
    ("split_device", "if link1 == row + _NEXT_ROW_WRITE:",
     "never link1 == row + _NEXT_ROW_WRITE"): _SHORT_CUT,
    ("split_device", "if link1 == row + _NEXT_ROW:", "never link1 == row + _NEXT_ROW"): _SHORT_CUT,
    ("split_device", "raise  # Of a queue that is released.",
     "without raise"): "used.idx, which is written next, raises the same",
    ("packed_device", "if (flags[at] if at < size else flags[at - size] ^ BOTH) & BOTH != available:",
     "never (flags[at] if at < size else flags[at - size] ^ BOTH) & BOTH != available"): _LOOK,
    ("packed_device", "announced: list[int] = flags[slot : slot + window].tolist()",
     "without the end slot + window"): _LOOK,
    ("packed_device", "announced += [beyond ^ BOTH for beyond in flags[: slot + window - size].tolist()]",
     "without the end slot + window - size"): _LOOK,
    ("packed_device", "if id1 < size and start >= 0 and length and end <= room and not chains[id1].in_flight:",
     "never id1 < size and start >= 0 and length and end <= room and not chains[id1].in_flight"): _SHORT_CUT,
    ("packed_device", "elif shape & ~VRING_DESC_F_WRITE == VRING_DESC_F_INDIRECT and indirect and at < free:",
     "shape, not shape & ~VRING_DESC_F_WRITE"): _SHORT_CUT,
    ("packed_device", "length and length1 and length2 and start >= 0 and start1 >= 0 and start2 >= 0",
     "never length and length1 and length2 and start >= 0 and start1 >= 0 and start2 >= 0 and end <= room and "
     "end1 <= room and end2 <= room and not chain.in_flight and (small or length + length1 + length2 <= LENGTH_MAX)"):
        _SHORT_CUT,
    ("packed_device", "and (small or length + length1 + length2 <= LENGTH_MAX)",
     "without small"): "it implies the other half",
    ("packed_device", "and (small or length + length1 + length2 <= LENGTH_MAX)",
     "without length + length1 + length2 <= LENGTH_MAX"): _SHORT_CUT,
    ("packed_device", "window = min(window, most)", "most, not min(window, most)"): _LOOK,
    ("packed_device", "window = min(window, most)", "window, not min(window, most)"): _LOOK,
    ("pci/msix", "entry = self._entries[abi.PCI_MSIX_ENTRY_SIZE * vector : abi.PCI_MSIX_ENTRY_SIZE * (vector + 1)]",
     "without the end abi.PCI_MSIX_ENTRY_SIZE * (vector + 1)"): "only the first entry's fields are used",
    ("pci/msix", 'return Message(address, int.from_bytes(entry[8:12], "little"))', "without the end 12"):
        "the control word behind it is 0 here: the vector is not masked",
    ("inflight", "self._resumed.update(self.waiting[:count])", "without the end count"): _WAITING,
    ("inflight_packed", "self._resumed |= {row[-1].id: row for row in self.waiting[:count]}",
     "without the end count"): _WAITING,
    ("vhost_user/backend", "if not self._is_served(ring) or ring.addresses is None:",
     "without ring.addresses is None"): _TYPE,
    ("vhost_user/message", "if self._header is None or self.wanted:", "without self._header is None"): _TYPE,
}  # fmt: skip
"""The reason, by module, the line's code and what was done."""
