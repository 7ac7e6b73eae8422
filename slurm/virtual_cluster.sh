#!/usr/bin/env bash
# Slurm with virtual nodes on one machine, to try sbatch files and to test: each node is a slurmd in namespaces of its
# own, so it has its own hostname, processes and /dev/shm, and shares the machine's cores, files and network.
#
#   eval "$(slurm/virtual_cluster.sh start)"    # prints what a shell needs; does nothing if it runs already
#   slurm/virtual_cluster.sh stop               # ends its jobs and daemons, and removes its folder
#
# Environment: VIRTUAL_CLUSTER its folder (default: virtual-cluster in TMPDIR), and at start VIRTUAL_NODES (3),
# VIRTUAL_CPUS (64) and VIRTUAL_GPUS (4, of which only the files are there) of each.
# Exit status: 0 done, 1 failed, 2 this machine cannot run it.
set -euo pipefail

folder=${VIRTUAL_CLUSTER:-${TMPDIR:-/tmp}/virtual-cluster}
nodes=${VIRTUAL_NODES:-3} cpus=${VIRTUAL_CPUS:-64} gpus=${VIRTUAL_GPUS:-4}
packages="slurmctld slurmd slurm-client libpmix-dev"
export SLURM_CONF=$folder/slurm.conf

refuse() {
    echo "virtual_cluster.sh: $1" >&2
    exit 2
}

require_what_it_needs() {
    [[ $(uname) == Linux ]] || refuse "needs Linux"
    ((EUID == 0)) || refuse "needs root, to start daemons in namespaces of their own"
    for program in slurmctld slurmd sbatch; do
        [[ -x $(command -v $program) ]] ||
            refuse "there is no $program; on Debian: apt-get install --no-install-recommends $packages"
    done
    command -v unshare >/dev/null || refuse "there is no unshare; on Debian: apt-get install util-linux"
    unshare --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null ||
        refuse "unshare may not make namespaces here; a container needs to be started with --privileged"
}

# in_use PORT
in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

write_configuration() {
    local port=17000 node
    while in_use $port; do port=$((port + 100)); done
    mkdir -p "$folder/state" "$folder/log" "$folder/gpus"
    grep -v -E '\sn[0-9]+$' /etc/hosts >"$folder/hosts"
    for ((node = 1; node <= nodes; node++)); do
        mkdir -p "$folder/spool.n$node" "$folder/tmp.n$node"
        echo "127.0.0.1 n$node" >>"$folder/hosts"
    done
    cat >"$SLURM_CONF" <<CONFIGURATION
ClusterName=virtual
SlurmctldHost=$(uname -n | cut -d. -f1)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/none
CredType=cred/none
# A job that is requeued waits until its old credential has expired.
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/state/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdSpoolDir=$folder/spool.%n
SlurmdPidFile=$folder/spool.%n/slurmd.pid
SlurmdLogFile=$folder/log/%n.log
# PMIx keeps a folder there per job, which nodes must not share.
TmpFS=$folder/tmp.%n
# Believe the CPUs below, not the machine's.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,bf_interval=1,batch_sched_delay=0
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
# Keep what ended, for "scontrol show job": there is no accounting.
MinJobAge=86400
GresTypes=gpu
CONFIGURATION
    for ((node = 1; node <= nodes; node++)); do
        echo "NodeName=n$node NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$cpus RealMemory=$(memory) Gres=gpu:$gpus"
    done >>"$SLURM_CONF"
    echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
    for ((gpu = 0; gpu < gpus; gpu++)); do ln -s /dev/null "$folder/gpus/nvidia$gpu"; done
    echo "NodeName=n[1-$nodes] Name=gpu File=$folder/gpus/nvidia[0-$((gpus - 1))]" >"$folder/gres.conf"
    echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"
}

# Of the machine, in MiB.
memory() { awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo; }

start_node() {
    # The first process of a PID namespace takes all others with it when it ends.
    unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -c "
        hostname $1
        mount -t tmpfs -o mode=1777 shm /dev/shm
        mount --bind '$folder/hosts' /etc/hosts
        slurmd -D -N $1 & wait" </dev/null >>"$folder/log/$1.out" 2>&1 &
    echo $! >"$folder/$1.pid"
}

# alive PID_FILE: whether that process lives and is of this cluster, not another that got its number since.
alive() { [[ -s $1 ]] && grep -aqsF "SLURM_CONF=$SLURM_CONF" "/proc/$(<"$1")/environ"; }

up() { [[ $(sinfo -h -N -o %T 2>/dev/null | grep -c -E '^(idle|mixed|allocated)$') == "$nodes" ]]; }

start() {
    require_what_it_needs
    alive "$folder/slurmctld.pid" || {
        stop
        write_configuration
        slurmctld -D </dev/null >>"$folder/log/slurmctld.out" 2>&1 &
        echo $! >"$folder/slurmctld.pid"
    }
    for ((node = 1; node <= nodes; node++)); do
        alive "$folder/n$node.pid" || start_node "n$node"
    done
    for ((attempt = 0; attempt < 100; attempt++)); do
        up && echo "export SLURM_CONF='$SLURM_CONF'" && return
        sleep 0.1
    done
    echo "virtual_cluster.sh: not all nodes came up within 10 s; the daemons' last words:" >&2
    tail -n 5 "$folder"/log/* >&2
    exit 1
}

stop() {
    [[ -d $folder ]] || return 0
    local file
    for file in "$folder"/n*.pid "$folder/slurmctld.pid"; do
        while alive "$file"; do
            kill -KILL "$(<"$file")" 2>/dev/null || true
            sleep 0.02
        done
    done
    until rm -rf "$folder" 2>/dev/null; do sleep 0.02; done # a node's processes may still be ending
}

case ${1:-} in
    start | stop) "$1" ;;
    *) refuse "say start or stop" ;;
esac
