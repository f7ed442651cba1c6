"""Control of a VMM over QMP: describe, stop, save and load device state, run. Used on both hosts."""
