#!/bin/busybox sh
# The first process of the guest: drivers, network, the disk reader, then the memory worker on the console.
# Reads from the kernel command line: farfault.{worker_mib,pause_ms,stale_mib,address}.

/bin/busybox mkdir -p /proc /sys
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

parameter() { # parameter NAME DEFAULT
    for word in $(cat /proc/cmdline); do
        case $word in "farfault.$1="*)
            echo "${word#*=}"
            return
            ;;
        esac
    done
    echo "$2"
}

while read -r module; do
    insmod "/modules/$module"
done </modules/order

# Free memory that holds old data, as on a machine that has been up for a while.
stale_mib=$(parameter stale_mib 0)
if [ "$stale_mib" -gt 0 ]; then
    /worker "$stale_mib" 1 1 0 >/dev/null
fi

# Answers "<the line that it was sent> <uptime>" to each connection: new processes and the network card at work.
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    ip address add "$(parameter address 10.0.2.15/24)" dev eth0
    nc -ll -p 7 -e /answer &
fi

# Reads the disk past the page cache, part by part: the device writes straight into guest memory.
check_disk() {
    count=0
    while :; do
        while read -r first_mib size_mib expected; do
            count=$((count + 1))
            seen=$(dd if=/dev/vda bs=1M skip="$first_mib" count="$size_mib" iflag=direct 2>/dev/null | md5sum)
            if [ "${seen%% *}" = "$expected" ]; then
                echo "D $count ok"
            else
                echo "D $count BAD"
            fi
            sleep 1
        done </disk.md5
    done
}
if [ -e /dev/vda ]; then
    check_disk &
fi

exec /worker "$(parameter worker_mib 96)" 1 0 "$(parameter pause_ms 10)"
