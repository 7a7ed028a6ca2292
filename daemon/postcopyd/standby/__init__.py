"""A process that has everything loaded and waits for the daemon to die.

Two thirds of the time that a guest stands still after a crash go into starting Python. So the daemon keeps a child that
has done that (`keeper`, `process`). The child outlives it, as the unit's KillMode= is `process`. What the service
manager starts then asks the child to go on in its place (`claim`), before it loads anything itself:

    new process                       standby                           service manager
    connects to $RUNTIME_DIRECTORY/standby.sock
    program, argv, environment, descriptors ->
                                      <- its process number
    MAINPID=standby  --------------------------------------------->
    "main" ->                         FDSTORE, BARRIER  ------------->  does it take the standby's word?
                                      <- "taken", or "refused"
    exits, or starts as ever

The standby touches no session before the service manager has taken it for the main process, so never do two daemons
serve one guest. Whatever else happens ends both, or only the standby, and the next start is an ordinary one.
Source: sd_notify(3) MAINPID=; systemd.kill(5) KillMode=.
"""
