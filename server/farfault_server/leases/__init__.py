"""Who may read the memory, who owns the VM, and a record of both that survives the server.

What happens to a lease whose client disappears:

* VM running (nothing was suspended): after `book.MIGRATION_IDLE_S` another destination may take the lease over.
* `Suspend` under way: the VM runs again, under a new generation.
* VM suspended, last chunk of device state sent, not handed over: the VM is taken back, under a new generation, when
  nothing was heard of the destination for as long as it had said (`hold`). One that had said nothing, or has not said
  so again to a server that was restarted, may hold all it needs to run the VM and may only be unreachable for now, so
  it decides, with HandOver, Resume or Release. An operator who knows that it will not come back starts the server with
  ``--abandon``, which resumes the VM.
* Handed over: the destination owns the VM. The server serves pages to whoever shows the token, for as long as it
  runs, and never resumes the source.
* Clone lease: given up after `book.CLONE_IDLE_S` when its place is needed.
"""
