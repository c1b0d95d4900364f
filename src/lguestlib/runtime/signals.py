"""The signals that end a session."""

import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""One the process was started to ignore, as by nohup(1), stays ignored."""
