"""vhost-user conversations that no front-end should have: each ends, and every descriptor is closed once."""

from virtio.test_vhost_user_backend import Plain, transcript

_DEVICE = Plain("plain")


def one(seed: int) -> int:
    """The conversation of *seed*; how many messages it had."""
    return transcript(_DEVICE, seed)
