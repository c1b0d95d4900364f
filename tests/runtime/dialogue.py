"""What the built-in guest says, and the one in Python after it."""

HELP = """\
  help                    show this
  ping [ADDRESS [COUNT]]  send echo requests, to the gateway unless told
  read SECTOR [DISK]      show a sector
  write SECTOR TEXT       fill a sector of disk 0
  flush [DISK]            wait until what was written is on stable storage
  rand N                  show N random bytes
  stat                    show the devices and their counters
  reset [N]               reset every device but the console, N times, under load
  off                     switch off
  reboot                  start over
"""

REFUSED = {
    "nonsense": "nonsense: unknown command; try help",
    "read 99999": "read: sector 99999 is past the end of the disk (capacity 128 sectors)",
    "read 128": "read: sector 128 is past the end of the disk (capacity 128 sectors)",
    "write 0x80 x": "write: sector 128 is past the end of the disk (capacity 128 sectors)",
    "read 18446744073709551615":
        "read: sector 18446744073709551615 is past the end of the disk (capacity 128 sectors)",
    "read 18446744073709551616": "read: '18446744073709551616' is not a sector number",
    "read abc": "read: 'abc' is not a sector number",
    "read 5x": "read: '5x' is not a sector number",
    "read -1": "read: '-1' is not a sector number",
    "read 0x": "read: '0x' is not a sector number",
    "read": "read: which sector?",
    "read 5 1": "read: no disk 1",
    "read 5 b": "read: 'b' is not a disk number",
    "read 5 0 0": "read: '0' is one word too many",
    "write": "write: which sector?",
    "write 5 " + "x" * 513: "write: the text is longer than a sector",
    "flush 7": "flush: no disk 7",
    "rand": "rand: how many bytes?",
    "rand 0": "rand: '0' is not a number from 1 to 1024",
    "rand 1025": "rand: '1025' is not a number from 1 to 1024",
    "ping 1.2.3": "ping: '1.2.3' is not an address",
    "ping 1.2.3.256": "ping: '1.2.3.256' is not an address",
    "ping 1.2.3.4 0": "ping: '0' is not a count from 1 to 1000",
    "reset x": "reset: 'x' is not a count",
    "off now": "off: 'now' is one word too many",
}  # fmt: skip
"""Commands that cannot be done on a machine with one disk of 128 sectors, and the one line each gets."""
