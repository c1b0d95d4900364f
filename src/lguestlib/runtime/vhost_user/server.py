"""A device behind a Unix socket: one front-end after another, each for as long as it stays."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable

from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import describe
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.conversation import Conversation
from lguestlib.runtime.vhost_user.process_rings import ProcessRings, QueueProcesses
from lguestlib.runtime.vhost_user.rings import Rings
from lguestlib.runtime.vhost_user.stream import MessageStream
from lguestlib.runtime.vhost_user.thread_rings import ThreadRings
from lguestlib.virtio.device import Device

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED)
_PASSING_SECONDS = 0.05


class Server:
    """Serves *device* on *listener*, a listening socket or one that is connected already; it owns it.

    Each queue has a thread here, or where *processes* are given a process there,
    which stay the caller's.  Before they sleep queues' threads look for work for up to
    *poll* nanoseconds.  *report* is given lines for people.  *on_end* is called, on the
    server's thread, when there will be no more front-ends.
    """

    def __init__(
        self,
        device: Device,
        listener: socket.socket,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        on_end: Callable[[], None] = lambda: None,
        processes: QueueProcesses | None = None,
        poll: int = 0,
    ) -> None:
        self.device = device
        self.processes = processes
        self.queues = tuple(device.queues())
        self.counters = [QueueCounters() for _ in self.queues]
        """What the queues have done; processes, until they were last asked (`QueueProcesses.count`)."""
        self._socket = listener
        self._report = report
        self._tracer = tracer
        self._on_end = on_end
        self._poll = poll
        self._stopping = False
        # Held while the conversation is looked at, or replaced.
        self._lock = threading.Lock()
        self._conversation: Conversation | None = None
        self._thread = threading.Thread(target=self._run, name=f"{device.name} server", daemon=True)

    def start(self) -> None:
        """Begin to take connections."""
        self._thread.start()

    def _run(self) -> None:
        name_this_thread(self._thread.name)
        try:
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                while not self._stopping:
                    self._converse(self._accept())
            else:
                self._converse(self._socket.dup())
        except OSError as error:
            if not self._stopping:
                self._report(f"{self.device.name}: no more connections: {os.strerror(error.errno or 0)}")
        finally:
            self._on_end()

    def _accept(self) -> socket.socket:
        """The next connection, though the process may be out of descriptors for a while."""
        told = False
        while True:
            try:
                return self._socket.accept()[0]
            except OSError as error:
                if self._stopping or error.errno not in _PASSING:
                    raise
                if not told:
                    self._report(f"{self.device.name}: a connection has to wait: {error.strerror}")
                told = True
                time.sleep(_PASSING_SECONDS)

    def _converse(self, connection: socket.socket) -> None:
        stream = MessageStream(connection)
        conversation = Conversation(self.device, self.queues, self._rings(), stream, self._report)
        with self._lock:
            self._conversation = conversation
            if self._stopping:
                conversation.end()
        try:
            conversation.run()
        except Exception as error:
            # Something has not been given back; the next front-end is served all the same.
            self._report(f"{self.device.name}: {describe(error)}")
        finally:
            with self._lock:
                self._conversation = None

    def _rings(self) -> Rings:
        if self.processes:
            return ProcessRings(self.processes)
        return ThreadRings(self.device.name, self.queues, self.counters, self._tracer, self._poll)

    def request_stop(self) -> None:
        """End the connection there is, take no more, and return at once; any thread may call this."""
        with self._lock:
            self._stopping = True
            try:
                # Wakes who sleeps in accept(2).
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            if self._conversation:
                self._conversation.end()

    def stop(self) -> None:
        """`request_stop`, and return when every thread has ended."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop, and close the socket."""
        self.stop()
        self._socket.close()
