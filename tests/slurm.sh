#!/usr/bin/env bash
# A real SLURM on one Debian machine, two nodes of a CPU each: a smoke study as an array of four tasks,
# one of them requeued while it runs, gives what a single process gives, to the bit.
#
#   apt-get install slurm-wlm munge procps && bash tests/slurm.sh      # as root; 5 minutes and more
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d) host=$(hostname -s)
export SLURM_CONF=$work/slurm.conf OMP_NUM_THREADS=1

stop() {
  for daemon in slurmctld n1 n2 munged; do
    pkill -F "$work/$daemon.pid" || true
  done
  for _ in $(seq 30); do                                # they still write their state as they end
    rm -rf "$work" && break
    sleep 1
  done
}
trap stop EXIT

# --- SLURM -------------------------------------------------------------------------------------

cat > "$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=$work/state
SlurmctldPidFile=$work/slurmctld.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdSpoolDir=$work/spool-%n
SlurmdPidFile=$work/%n.pid
SlurmdLogFile=$work/%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES State=UP
CONF
mkdir -p "$work/state"
head -c 32 /dev/urandom > "$work/munge.key"         # a munge of its own, whatever the machine runs
chmod 400 "$work/munge.key"
munged --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
  --pid-file="$work/munged.pid" --log-file="$work/munged.log" --seed-file="$work/munged.seed"
slurmctld
for node in n1 n2; do slurmd -N $node; done
for _ in $(seq 30); do
  [ "$(sinfo -h -t idle -o %D)" = 2 ] && break
  sleep 1
done
sinfo
[ "$(sinfo -h -t idle -o %D)" = 2 ]

# --- The study ---------------------------------------------------------------------------------

single=$(sbatch --parsable --output="$work/single.out" run_all.sh smoke \
  --results "$work/single" --figures-dir "$work/single-figures")
job=$(sbatch --parsable --array=0-3 --output="$work/task-%a.out" run_all.sh smoke \
  --results "$work/array" --figures-dir "$work/figures")
until ls "$work"/array/smoke/*/*/*/*/.lock >/dev/null 2>&1; do
  [ -n "$(squeue -h -j "$job")" ] || { tail "$work"/task-*.out; exit 1; }      # it ended before
  sleep 0.2
done
scontrol requeue "${job}_0"
scontrol show job "${job}_0" | grep -o "Restarts=1"     # it was running, and runs again
last=$(sbatch --parsable --dependency="afterok:$job" --output="$work/last.out" run_all.sh smoke \
  --results "$work/array" --figures-dir "$work/figures")
while squeue -h -j "$single,$last" 2>/dev/null | grep -q .; do sleep 2; done
tail -n 3 "$work"/*.out
grep -q "^figures: .*table4 complete" "$work/last.out"
! grep -qE "^figures: .*(incomplete|NOT DRAWN)" "$work/last.out" || exit 1

cd "$work"
python3 - <<'PYTHON'
import json, pathlib
def runs(name):
    return {path.parent.relative_to(name): path for path in pathlib.Path(name).rglob("run.json")}
array, single = runs("array"), runs("single")
assert array.keys() == single.keys() and len(array) > 100, (len(array), len(single))
for run, path in single.items():
    one, other = (json.loads(each.read_text()) for each in (path, array[run]))
    assert all(one[key] == other[key] for key in ("settings", "result")), run
    for file in path.parent.glob("[hw]*"):          # history.npz, weights.pt
        assert file.read_bytes() == (array[run].parent / file.name).read_bytes(), (run, file.name)
print(f"{len(array)} runs of the array equal those of a single process")
PYTHON
