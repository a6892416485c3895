"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A busy machine is no failure: what a test costs is measured elsewhere.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A test run in the background ignores Ctrl-C, and the programs that tests start would inherit
    # that. A handler of our own becomes the default one in them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
