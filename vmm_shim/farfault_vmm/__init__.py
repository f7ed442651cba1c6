"""Control of a VMM over QMP: describe, stop, save and load device state, run. Used on both hosts.

A VMM that serves the following subset of QMP on a unix socket can be moved; QEMU 4.0 and later does.

Framing: JSON objects. A server ends each of its own with CRLF. A client need not end its objects with anything:
``qemu.qmp`` sends them back to back, so a server parses object by object and skips white space in between. The reply
to a command is ``{"return": ...}`` or ``{"error": {"class": "GenericError", "desc": "..."}}``, with the ``id`` of the
command where it had one (``qmp_capabilities`` has none). Commands run in the order in which they came: the client
sends ``stop`` and ``migrate`` without a wait in between. To QEMU it sends ``migrate`` alone: QEMU stops the VM itself
when it has written all but the device state. One client at a time; when it leaves, the VM stays as it is and the next
one may connect.

On connect the server speaks first::

    {"QMP": {"version": {"NAME": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}

NAME is ``qemu`` for QEMU; another VMM puts its own name there, for example ``farfault-reference``.

============================ ======================================= ==============================================
command                      arguments                               return
============================ ======================================= ==============================================
``qmp_capabilities``         ``{"enable": ["oob"]}`` or none         ``{}``
``query-status``             none                                    ``{"status": S, "running": bool}``
``qom-get``                  ``{"path": "/machine",                  the type's name: ``"pc-i440fx-7.2-machine"``
                             "property": "type"}``
``query-memdev``             none                                    ``[{"id": str, "size": bytes, "share": bool}]``
``query-cpus-fast``          none                                    ``[{"cpu-index": int}]``
``query-kvm``                none                                    ``{"enabled": bool, "present": bool}``
``query-migrate``            none                                    ``{}`` or ``{"status": M, "error-desc": str}``
``query-migrate-             none                                    ``[{"capability": str, "state": bool}]``
capabilities``
``migrate-set-               ``{"capabilities": [{"capability":      ``{}``; an error for an unknown name
capabilities``               "x-ignore-shared", "state": true},
                             {"capability": "events", ...}]}``
``getfd``                    ``{"fdname": "farfault-state"}``        ``{}``; the descriptor came by SCM_RIGHTS with
                                                                     one blank right before the command
``stop``                     none                                    ``{}``, after the event STOP; while ``inmigrate``
                                                                     only: do not start after the load
``cont``                     none                                    ``{}``; the event RESUME comes before or after
``migrate``                  ``{"uri": "fd:farfault-state"}``        ``{}`` at once; then writes the device state to
                                                                     the descriptor (a stream socket), closes it
``migrate-incoming``         ``{"uri": "fd:farfault-state"}``        ``{}`` at once; then reads the device state from
                                                                     the descriptor to its end and loads it
``migrate_cancel``           none                                    ``{}``; no error where nothing is under way
``quit``                     none                                    ``{}``, then the VMM ends
============================ ======================================= ==============================================

``getfd`` of a name that is open replaces it; ``migrate`` and ``migrate-incoming`` use a name up. S is one of
``running``, ``paused``, ``prelaunch``, ``inmigrate`` (started to receive, nothing loaded), ``postmigrate`` (state
saved; ``cont`` resumes); with another value the VM can not be moved. After a load S is ``paused``: the VM never
starts on its own.

================ ============================= ==================================================================
event            data                          when
================ ============================= ==================================================================
``STOP``         none                          no vCPU runs any more
``RESUME``       none                          the vCPUs are about to run
``MIGRATION``    ``{"status": M}``             each change of M, on both sides, where the capability ``events``
                                               is on
``SHUTDOWN``     any                           the VMM is about to end
================ ============================= ==================================================================

M is one of ``setup``, ``active``, ``completed``, ``failed``, ``cancelling``, ``cancelled``; other values are
ignored. Each event carries ``"timestamp": {"seconds": int, "microseconds": int}`` of the Unix clock: the downtime
is computed from that of STOP and that of RESUME.

Why a descriptor and not a socket path: QEMU often runs as another user, in another mount namespace or under a
sandbox; a descriptor needs no place that both can reach, and nothing has to be connected after the VM has stopped.
"""
