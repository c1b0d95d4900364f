"""The typed model of virtio 1.3, sans-IO: views in, decisions out.

Rings from both sides, descriptor chains, feature negotiation, devices as one
service function per queue, transports as state machines.  No thread, file
descriptor, socket or hypervisor is known here.
"""
