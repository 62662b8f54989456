#!/bin/sh
# A real Slurm on this machine, for tests: two nodes of two cores each at 127.0.0.1, started and stopped without systemd.
#
#   tests/cluster/slurm.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/cluster/slurm.sh stop FOLDER
#
# Needs root, and Debian's packages slurm-wlm and munge; INSTALL_SLURM=1 installs them where they are missing. Ends with
# status 3 and one line when Slurm cannot be had here.
set -eu

absent() {
    echo "$1"
    exit 3
}

start() {
    folder=$1
    [ "$(id -u)" -eq 0 ] || absent "needs root to start munged and slurmd"
    if [ "${INSTALL_SLURM:-}" = 1 ] && ! command -v slurmctld >/dev/null; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    fi >&2
    for program in slurmctld slurmd munged sbatch; do
        command -v "$program" >/dev/null || absent "no $program: apt-get install slurm-wlm munge, or INSTALL_SLURM=1"
    done
    mkdir -p "$folder/state"
    folder=$(cd "$folder" && pwd)
    mkdir -p /run/munge
    chown munge:munge /run/munge
    if ! munge -n >/dev/null 2>&1; then
        setpriv --reuid=munge --regid=munge --init-groups munged
        touch "$folder/munged"
    fi
    host=$(hostname)
    port=${SLURM_TEST_PORT:-16817}
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
# how long a requeued job waits
AuthInfo=cred_expire=20
MinJobAge=600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2
# more cores than the machine may have
SlurmdParameters=config_overrides
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld >>"$folder/start.log" 2>&1
    for node in one two; do
        slurmd -N "$node" >>"$folder/start.log" 2>&1
    done
    tries=0
    until [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; do
        tries=$((tries + 1))
        if [ "$tries" -gt 150 ]; then
            cat "$folder/start.log" >&2
            stop "$folder"
            absent "its nodes did not come up within 30 seconds"
        fi
        sleep 0.2
    done
}

stop() {
    folder=$1
    export SLURM_CONF="$folder/slurm.conf"
    scancel --user="$(id -un)" 2>/dev/null || :
    tries=0
    while [ -n "$(squeue --noheader --states=all --format=%T 2>/dev/null | grep -E 'RUNNING|COMPLETING')" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || break # what does not end goes with its node
        sleep 0.2
    done
    for name in slurmd-one slurmd-two slurmctld; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null || :)
        [ -n "$pid" ] || continue
        kill "$pid" 2>/dev/null || :
        tries=0
        while kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 50 ]; do
            tries=$((tries + 1))
            sleep 0.2
        done
    done
    if [ -f "$folder/munged" ]; then
        kill "$(cat /run/munge/munged.pid)" 2>/dev/null || :
    fi
}

case ${1:-} in
    start | stop) "$1" "${2:?which folder?}" ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
