"""Damaged kernels and initial ramdisks: placed whole, or refused in one line with memory untouched."""

from random import Random

from memory.images import Load, bzimage, elf

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.linux_boot import LinuxBoot, ram_map
from lguestlib.memory.image.parse import parse

IMAGES = 20
"""What one seed makes."""

SIZE = 0x20_0000
_FILL = bytes([0xA5]) * SIZE
_LOADS = [Load(0x1000, b"first" * 100, 0x1000), Load(0x3000, b"second" * 20, 0x2000)]
_KINDS = (bytes(elf(32, 0x1010, _LOADS)), bytes(elf(64, 0x1010, _LOADS)), bytes(bzimage(b"code" * 100)))
_NUMBERS = (0, 1, 2, 4, 0x7F, 0x80, 0xFF, 0x1000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1)


def one(seed: int) -> int:
    """The images of *seed*; how many."""
    random = Random(seed)
    with GuestMemory.anonymous(SIZE) as memory:
        for _ in range(IMAGES):
            memory.write(GuestAddress(0), _FILL)
            damaged = _damaged(random)
            ramdisk = random.randbytes(random.choice((0, 1, 4096, 5000)))
            if random.random() < 0.05:
                ramdisk = bytes(SIZE)
            placed = False
            try:
                image = parse(damaged)
                image.place(memory)
                placed = True
                LinuxBoot(image, ram_map(memory), random.randbytes(random.choice((0, 20, 3000))), ramdisk).place(memory)
            except ImageError as error:
                assert str(error) and "\n" not in str(error)
                assert placed or memory.read(GuestAddress(0), SIZE) == _FILL
    return IMAGES


def _damaged(random: Random) -> bytes:
    image = bytearray(random.choice(_KINDS))
    for _ in range(random.choice((1, 2, 4))):
        width = random.choice((1, 2, 4, 8))
        # Headers are at the start, or where the setup header of a bzImage is.
        at = random.randrange(256) if random.random() < 0.6 else 0x1F1 + random.randrange(0x80)
        if at + width <= len(image):
            number = random.choice(_NUMBERS) if random.random() < 0.7 else random.getrandbits(64)
            image[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    if random.random() < 0.1:
        del image[random.randrange(len(image)) :]
    return bytes(image)
