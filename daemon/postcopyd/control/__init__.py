"""Control of one daemon over a UNIX socket: the service, its client, and what it needs of the daemon."""
