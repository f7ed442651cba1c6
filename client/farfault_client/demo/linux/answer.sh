#!/bin/busybox sh
# One connection of the guest's network service: a line in, the line and the seconds since boot out.
read -r line
read -r uptime_s _ </proc/uptime
echo "$line $uptime_s"
