"""What all tests of this folder share."""

from tests.threads import one_thread as one_thread
