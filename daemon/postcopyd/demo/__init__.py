"""`postcopyd demo`: a running virtual machine is moved on this host, by the real programs, and every byte is checked."""

import os

# gRPC reads this when it is loaded, and would comment every start of a process; ours exec at once and need no care.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
