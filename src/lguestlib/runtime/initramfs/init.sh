#!/bin/sh
# The guest's init, process 1, in busybox: gets the guest going and gives its console to
# a shell, or runs /commands in place of one; then it switches the guest off.
#
# Words of the kernel's command line that count here:
#   ip=GUEST::HOST:NETMASK  addresses for the first network card, and the way out
#   hostname=NAME           lguest otherwise
#   root=/dev/DISK          go on with the system on that disk,
#   init=PROGRAM            whose first program is this one, or /sbin/init
#   verdict=/dev/TTY        tell the machine there how it went
#
# /modules holds the drivers to load, in the order of their names.
export PATH=/sbin:/bin HOME=/root TERM=linux

/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done

# The console is the last of its words on the command line that the kernel has a driver for.
console=/dev/$(sed 's/.* //' /sys/class/tty/console/active)
exec <"$console" >"$console" 2>&1
case $console in
    # The terminal at the other end sees to its own carriage returns.
    /dev/hvc*) stty -onlcr ;;
esac

# end STATUS: switch the guest off; User-mode Linux then ends with this exit status.
end() {
    [ -e /proc/exitcode ] && echo "$1" >/proc/exitcode
    # The kernel's farewell is not part of the guest's output; and that has to be out.
    echo 0 >/proc/sys/kernel/printk
    exec </dev/null >/dev/null 2>&1
    [ -n "$verdict" ] && echo "$1" >"$verdict"
    umount -a -r
    poweroff -f
}

# wait_for COMMAND...: until it succeeds, some two seconds at most.
wait_for() {
    for _ in $(seq 100); do
        "$@" && return
        sleep 0.02
    done
    return 1
}

# Sets network to the name of the first card with a virtio driver.
find_network() {
    for network in $(ls /sys/class/net); do
        case $(readlink "/sys/class/net/$network/device/subsystem") in
            */virtio) return ;;
        esac
    done
    return 1
}

set -f
ip='' hostname=lguest root='' init=/sbin/init verdict=''
for word in $(cat /proc/cmdline); do
    case $word in
        ip=*) ip=${word#*=} ;;
        hostname=*) hostname=${word#*=} ;;
        root=/dev/*) root=${word#*=} ;;
        init=*) init=${word#*=} ;;
        verdict=/dev/*) verdict=${word#*=} ;;
    esac
done
set +f

hostname "$hostname"
ip link set lo up
if [ -n "$ip" ]; then
    if wait_for find_network; then
        host=${ip#*::} netmask=${ip##*:}
        host=${host%:*}
        ip address add "${ip%%:*}/$netmask" dev "$network"
        ip link set "$network" up
        ip route add default via "$host"
    else
        echo "init: ip=$ip: the guest has no network card"
    fi
fi

if [ -n "$root" ]; then
    if wait_for [ -b "$root" ] && mount "$root" /root; then
        for place in dev proc sys; do
            mount --move "/$place" "/root/$place"
        done
        exec switch_root -c "$console" /root "$init"
    fi
    echo "init: root=$root: cannot be mounted"
    end 1
fi

cd /root || end 1
if [ -e /commands ]; then
    sh /commands </dev/null
else
    # Without -f they ask process 1, which is no init that would know what they say.
    echo "alias poweroff='poweroff -f' reboot='reboot -f' halt='halt -f'" >/aliases
    PS1='\h:\w \$ ' ENV=/aliases setsid -c sh
fi
end $?
