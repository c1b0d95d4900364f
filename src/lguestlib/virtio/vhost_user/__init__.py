"""vhost-user, sans-IO: messages, and the back-end's and the front-end's side of the conversation.

A front-end, which has the guest, hands a back-end, which has the device, the
guest's memory and two eventfds for each queue, over a Unix socket.  Nothing of
this package has a socket: bytes and descriptors in, bytes, descriptors and
effects out.
"""
