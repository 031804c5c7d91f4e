"""What happens around the work of one job: one bad slide ends nothing else, memory and time are watched.

In reading order: job (what a rule's script enters), isolation, memory, timings, devices, racks.
"""
