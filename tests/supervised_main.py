"""`python -m supervised_main ARGV…`: a supervisor of ARGV that says at its end what it still holds."""

from __future__ import annotations

import json
import sys

from postcopyd.supervise import Supervisor

if __name__ == "__main__":
    supervisor = Supervisor(sys.argv[1:])
    status = supervisor.run()
    print(json.dumps({"status": status, "held": supervisor.held}), flush=True)
