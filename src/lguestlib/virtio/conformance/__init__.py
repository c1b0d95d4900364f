"""How rings and transports go wrong, as data: named cases that anybody's device can be held against.

`case` says what a case is, `catalogue` has them all, `place` lays one out in guest
memory, and `ring` runs one against this library's own queues.  Whoever has a device
with threads or a socket runs the same cases (`lguestlib.runtime.vhost_user.conform`).
"""
