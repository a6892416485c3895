"""What holds for all tests."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A test run in the background ignores Ctrl-C, and the programs that tests start would inherit
    # that. A handler of our own becomes the default one in them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
