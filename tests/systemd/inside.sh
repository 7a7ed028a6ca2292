#!/bin/bash
# Becomes PID 1 of a private systemd: private_systemd.py runs this in new PID, mount, cgroup, UTS and IPC name spaces.
#
# usage: inside.sh WORK ETC INTERPRETER PYTHON LIBRARY SOURCES
#   WORK     an empty directory that is ours
#   ETC      files for /etc, with all of /etc/systemd/system
#   INTERPRETER, PYTHON, LIBRARY, SOURCES   what a service that sees no /root needs to run postcopyd: an interpreter, its
#            prefix, third-party packages and ours. They become /opt/python, /opt/venv, a virtual environment as an
#            installation has, and /opt/postcopyd
#
# Nothing that happens here is seen outside: files are written to overlays and tmpfs, and no sysctl can be changed.
set -euo pipefail
work=$1 etc=$2 interpreter=$3 python=$4 library=$5 sources=$6

# Of the host's own units only what a system must have to come up.
stock_units="
  basic.target sysinit.target sockets.target timers.target paths.target slices.target multi-user.target network.target
  network-online.target local-fs.target local-fs-pre.target swap.target shutdown.target umount.target final.target
  exit.target systemd-exit.service
  systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket dbus.service dbus.socket
"

mount --make-rprivate /
hostname postcopyd-test
mount -t tmpfs -o mode=755 tmpfs "$work"

overlay() {
  mkdir -p "$work/$1.upper" "$work/$1.work"
  mount -t overlay overlay -o "lowerdir=/$1,upperdir=$work/$1.upper,workdir=$work/$1.work" "/$1"
}

own_files() {
  overlay etc
  overlay var
  overlay opt
  local packages=/opt/venv/lib/$(basename "$interpreter")/site-packages
  mkdir -p /opt/python /opt/venv/bin "$packages" /opt/postcopyd /opt/pycache
  mount --bind "$python" /opt/python
  mount --bind "$library" "$packages"
  ln -s "/opt/python/bin/$(basename "$interpreter")" /opt/venv/bin/python
  printf "home = /opt/python/bin\ninclude-system-site-packages = false\n" > /opt/venv/pyvenv.cfg
  mount --bind "$sources" /opt/postcopyd
  rm -rf /etc/systemd/system /etc/fstab
  cp -r "$etc/." /etc
  chmod -R u=rwX,go=rX /etc/systemd/system
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
  mkdir /run/lock
}

own_units() {
  local stock=/usr/lib/systemd/system kept=$work/units unit
  mkdir "$kept"
  for unit in $stock_units; do
    [ ! -e "$stock/$unit" ] || cp -P "$stock/$unit" "$kept/"
  done
  mkdir "$kept/sysinit.target.wants" "$kept/sockets.target.wants"
  ln -s ../systemd-journald.service "$kept/sysinit.target.wants/"
  for unit in systemd-journald.socket systemd-journald-dev-log.socket dbus.socket; do
    ln -s "../$unit" "$kept/sockets.target.wants/"
  done
  mount --bind "$kept" "$stock"
}

own_devices() {
  local dev=$work/dev node
  mkdir "$dev"
  mount -t tmpfs -o mode=755 tmpfs "$dev"
  for node in null zero full random urandom tty kvm userfaultfd; do
    [ ! -e "/dev/$node" ] || cp -a "/dev/$node" "$dev/"
  done
  mkdir "$dev/pts" "$dev/shm"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$dev/pts"
  # Guests and images lie on the host's.
  mount --bind /dev/shm "$dev/shm"
  ln -s pts/ptmx "$dev/ptmx"
  ln -s /proc/self/fd "$dev/fd"
  ln -s fd/0 "$dev/stdin"
  ln -s fd/1 "$dev/stdout"
  ln -s fd/2 "$dev/stderr"
  mount --rbind "$dev" /dev
}

own_kernel_files() {
  umount -lR /sys/fs/cgroup
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
  mount -o remount,bind,ro /sys
  mount --bind /proc/sys /proc/sys
  mount -o remount,bind,ro,nosuid,nodev,noexec /proc/sys
}

own_files
own_units
own_devices
own_kernel_files
umount -l "$work"
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=postcopyd-test LANG=C.UTF-8 SYSTEMD_GENERATOR_PATH=/nonexistent \
  /lib/systemd/systemd --system --unit=multi-user.target --show-status=no --log-target=journal
