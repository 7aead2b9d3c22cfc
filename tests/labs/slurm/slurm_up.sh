#!/usr/bin/env bash
# A real Slurm of two nodes on this machine: munge, MariaDB, slurmdbd, slurmctld and a slurmd for each node, all on
# 127.0.0.1, from Debian's packages, without systemd.
#
#   slurm_up.sh DIRECTORY PORT    five ports are used: PORT to PORT+4
#
# Prints "ready DIRECTORY/etc/slurm.conf" when both nodes are idle, and runs until its standard input ends. Then, and
# whenever it is killed by a signal that can be caught, it stops what it started and deletes DIRECTORY's database.
set -euo pipefail
LAB=$(readlink -f "$1")
PORT=$2
NODES=2
HOST=$(hostname -s)
export SLURM_CONF=$LAB/etc/slurm.conf
MUNGE=$LAB/run/munge/munge.sock
MYSQL=$LAB/run/mysql.sock

alive() { # PIDFILE: a zombie that PID 1 never reaps is dead
  local process
  process=$(cat "$1" 2>/dev/null) && grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$process/status"
}

stop() { # PIDFILE
  alive "$1" || return 0
  local process
  process=$(cat "$1")
  kill "$process" 2>/dev/null || true
  for _ in $(seq 50); do alive "$1" || return 0; sleep 0.1; done
  kill -9 "$process" 2>/dev/null || true
}

down() {
  trap - EXIT
  kill "${READER:-}" 2>/dev/null || true
  if alive "$LAB/run/slurmctld.pid"; then
    timeout 10 scancel --user=root 2>/dev/null || true
    for _ in $(seq 20); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
  fi
  for i in $(seq $NODES); do stop "$LAB/run/slurmd.n$i.pid"; done
  for daemon in slurmctld slurmdbd mariadbd munged; do stop "$LAB/run/$daemon.pid"; done
  local place
  for place in /proc/[0-9]*; do # slurmd takes its pid file away and waits for steps; what holds them outlives it
    if grep -qsz "^SLURM_CONF=$SLURM_CONF$" "$place/environ" &&
      { grep -qsz '^SLURMD_NODENAME=' "$place/environ" || grep -qs '^slurm' "$place/comm"; }; then
      kill -9 "${place#/proc/}" 2>/dev/null || true
    fi
  done
  rm -rf "$LAB/db"
}

wait_for() { # WHAT SECONDS COMMAND...
  local what=$1 end=$((SECONDS + $2))
  shift 2
  while [ $SECONDS -lt $end ]; do
    timeout 5 "$@" >"$LAB/run/wait.log" 2>&1 && return 0
    sleep 0.2
  done
  echo "no $what in time: $(tail -n 3 "$LAB/run/wait.log" | tr '\n' ' ')" >&2
  return 1
}

install_packages() { # policy-rc.d keeps apt from starting daemons, the lock one lab from disturbing another's apt
  local policy=/usr/sbin/policy-rc.d own=0 program missing=0
  for program in munged slurmctld slurmd slurmdbd sbatch sacct mariadbd mariadb-install-db; do
    command -v "$program" >/dev/null || missing=1
  done
  [ $missing = 1 ] || return 0
  if [ ! -e $policy ]; then own=1; printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; fi
  export DEBIAN_FRONTEND=noninteractive
  local wait="-o DPkg::Lock::Timeout=300"
  { apt-get -qq $wait update; apt-get -qq $wait install -y --no-install-recommends munge slurmctld slurmd slurm-client slurmdbd \
    slurm-wlm-mysql-plugin mariadb-server; } >"$LAB/log/apt.log" 2>&1 </dev/null || { tail -n 5 "$LAB/log/apt.log" >&2; exit 3; }
  if [ $own = 1 ]; then rm -f $policy; fi
}

start_munge() { # directories of key, log and socket must not be writable by others
  (umask 077; head -c 1024 /dev/urandom >"$LAB/munge/munge.key")
  munged --force --num-threads=2 --key-file="$LAB/munge/munge.key" --socket="$MUNGE" --pid-file="$LAB/run/munged.pid" \
    --log-file="$LAB/munge/munged.log" --seed-file="$LAB/munge/munged.seed"
  wait_for munged 10 munge -n -S "$MUNGE"
}

start_database() {
  mariadb-install-db --no-defaults --user=root --datadir="$LAB/db" --auth-root-authentication-method=normal \
    --skip-test-db >"$LAB/log/mariadb-install.log" 2>&1
  setsid mariadbd --no-defaults --user=root --datadir="$LAB/db" --socket="$MYSQL" --port=$((PORT + 2)) \
    --bind-address=127.0.0.1 --pid-file="$LAB/run/mariadbd.pid" --innodb-flush-log-at-trx-commit=0 \
    --innodb-doublewrite=0 --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    --log-error="$LAB/log/mariadbd.log" >/dev/null 2>&1 </dev/null &
  wait_for mariadbd 30 mariadb-admin --no-defaults -uroot --socket="$MYSQL" ping
  mariadb --no-defaults -uroot --socket="$MYSQL" -e "CREATE DATABASE lab; CREATE USER slurm@127.0.0.1
    IDENTIFIED BY 'slurm'; GRANT ALL ON lab.* TO slurm@127.0.0.1;"
}

start_accounting() { # NeMo Run asks sacct for states; slurmdbd.conf is found beside $SLURM_CONF and must be private
  (umask 077; cat >"$LAB/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$MUNGE
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
CommunicationParameters=NoInAddrAny
PidFile=$LAB/run/slurmdbd.pid
LogFile=$LAB/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=lab
CONF
  )
  slurmdbd </dev/null
  wait_for slurmdbd 30 sacctmgr -n list cluster
  sacctmgr -i add cluster lab >/dev/null
}

write_configuration() {
  # cred_expire: a requeued job is held for a second longer than this. SlurmdParameters: a node may claim more
  # processors than the machine has. AccountingStoragePass: without it slurmdbd is asked through munge's own socket.
  cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$MUNGE,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
StateSaveLocation=$LAB/spool/ctld
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
KillWait=30
MinJobAge=300
InactiveLimit=0
SlurmdTimeout=20
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$MUNGE
$(for i in $(seq $NODES); do
  echo "NodeName=n$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2 + i)) CPUs=4 RealMemory=4000 State=UNKNOWN"
done)
PartitionName=batch Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
}

start_nodes() {
  slurmctld </dev/null
  wait_for slurmctld 20 scontrol ping
  # jobs find a node by its name, as on a cluster; the machine's own /etc/hosts stays as it is
  { cat /etc/hosts; echo "127.0.0.1 $(seq -f n%g -s ' ' $NODES)"; } >"$LAB/etc/hosts"
  cat >"$LAB/etc/node.sh" <<NODE
mount --bind "$LAB/etc/hosts" /etc/hosts
exec slurmd -N "\$1" </dev/null
NODE
  for i in $(seq $NODES); do unshare --mount bash "$LAB/etc/node.sh" "n$i"; done
  idle() { [ "$(timeout 5 sinfo -h -N -t idle -o %N | wc -l)" = $NODES ]; }
  local end=$((SECONDS + 30))
  until idle; do
    [ $SECONDS -lt $end ] || { echo "the nodes are not idle in time: $(tail -n 2 "$LAB"/log/slurmd.n*.log | tr '\n' ' ')" >&2; return 1; }
    sleep 0.2
  done
}

mkdir -p "$LAB"/{etc,log,munge,db,run/munge,spool/ctld}
for i in $(seq $NODES); do mkdir -p "$LAB/spool/n$i"; done
chmod 755 "$LAB" "$LAB/run" "$LAB/run/munge"
chmod 700 "$LAB/munge"
trap down EXIT
trap 'exit 1' HUP INT TERM
install_packages
start_munge
write_configuration
start_database
start_accounting
start_nodes
echo "ready $SLURM_CONF"
exec 1>&-
# in the background, so that a signal is acted on at once
cat <&0 >/dev/null &
READER=$!
wait $READER
