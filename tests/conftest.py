"""Before any test module is imported."""

from __future__ import annotations

import os

# gRPC reads this when it is loaded. Its handlers run in every child between fork and exec, and with the threads of a
# test's own servers about they have crashed some of them; children of tests exec at once and need no care.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
