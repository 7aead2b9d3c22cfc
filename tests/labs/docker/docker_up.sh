#!/usr/bin/env bash
# A Docker daemon from Debian's docker.io: no registry, no bridge, no iptables, no systemd.
#
#   docker_up.sh up     unless a daemon answers: install what is missing, start dockerd, say "started"
#   docker_up.sh down   stop the dockerd that this script started; one that it found running is left alone
#
# LAB: the directory of the daemon's data, socket aside. Ends with 3 and one sentence where there can be no daemon.
set -euo pipefail

LAB=${LAB:-/var/tmp/graftwork-docker-lab}
SOCKET=/var/run/docker.sock

refuse() { echo "$1" >&2; exit 3; }

answers() { timeout 10 docker --host "unix://$SOCKET" version >/dev/null 2>&1; }

install_dockerd() {
  if command -v dockerd >/dev/null; then return; fi
  [ "$(id -u)" = 0 ] || refuse "no Docker daemon answers, and installing one needs root"
  command -v apt-get >/dev/null || refuse "no Docker daemon answers, and docker.io is installed with apt-get only"
  # Debian would start the service, with its bridge and iptables, and there may be no systemd to stop it
  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; }
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq -o DPkg::Lock::Timeout=120 update
    apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends docker.io; } >"$LAB/apt.log" 2>&1 \
    || refuse "apt-get could not install docker.io; its log is $LAB/apt.log"
}

mount_cgroups() { # the version 1 hierarchies that dockerd wants, on a machine where nothing is mounted
  if grep -qsE ' cgroup2? ' /proc/mounts; then return; fi
  mount -t tmpfs cgroup /sys/fs/cgroup
  local one
  for one in $(awk '!/^#/ && $4 == 1 {print $1}' /proc/cgroups); do
    mkdir -p "/sys/fs/cgroup/$one"
    mount -t cgroup -o "$one" cgroup "/sys/fs/cgroup/$one" || rmdir "/sys/fs/cgroup/$one"
  done
}

start_dockerd() {
  [ "$(id -u)" = 0 ] || refuse "no Docker daemon answers, and only root can start one"
  mount_cgroups || refuse "no Docker daemon answers, and control groups cannot be mounted here"
  # containers share the host's network, so neither a bridge nor address translation is set up
  setsid dockerd --host "unix://$SOCKET" --data-root "$LAB/data" --exec-root "$LAB/exec" --pidfile "$LAB/dockerd.pid" \
    --bridge=none --iptables=false --ip-forward=false --ip-masq=false >"$LAB/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 100); do if answers; then return; fi; sleep 0.3; done
  refuse "dockerd does not answer after 30 seconds; its log is $LAB/dockerd.log"
}

up() {
  if answers; then return; fi
  mkdir -p "$LAB"
  install_dockerd
  start_dockerd
  echo started
}

down() {
  local pid
  pid=$(cat "$LAB/dockerd.pid" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do [ -e "/proc/$pid" ] || return 0; sleep 0.1; done
  refuse "dockerd $pid does not end; its log is $LAB/dockerd.log"
}

case ${1:-up} in
up | down) "$1" ;;
*) echo "usage: $0 [up|down]" >&2; exit 2 ;;
esac
