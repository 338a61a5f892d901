#!/usr/bin/env bash
# Regenerates the paper's tables and figures, or runs the tests. Needs Python 3.11 or newer and pip.
#
#   bash run_all.sh [paper|short|overnight|quick|smoke] [options]     train, draw, judge the claims
#   bash run_all.sh test                                              the tests
#
# The default preset is short with a CUDA GPU, otherwise quick.
#
# Options, as in the scripts: --data real|auto|synthetic, --data-dir DIR, --results DIR, --figures-dir DIR,
# --device auto|cpu|cuda, --seed N, --jobs N, --eager, --deterministic, --dry-run (print the plan and stop).
#
# As a task of a SLURM array it trains its part of the runs and draws nothing: sbatch --array=0-31 run_all.sh paper
#SBATCH --requeue --open-mode=append --output=slurm-%A_%a.out
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # sh run_all.sh
refuse() { echo "error: $*" >&2; exit 2; }

from=$PWD here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -f "$here/common.py" ] || here=${SLURM_SUBMIT_DIR:-$here}     # sbatch runs a copy from elsewhere
[ -f "$here/common.py" ] || refuse "$here is not the package's folder${SLURM_JOB_ID:+: call sbatch in that folder}"
cd "$here" || exit 2
export USER=${USER:-$(id -u)}   # PyTorch asks for the name of a user who may have none
unset MPLBACKEND                # Jupyter's is none of ours

# --- What is asked for -------------------------------------------------------------------------

what="" device=auto dry="" train=() data=() drop=() draw=()
while [ $# -gt 0 ]; do
  [[ $1 == --*=* && ! $1 =~ ^--(eager|deterministic|dry-run)= ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h|--help) sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' run_all.sh; exit 0 ;;
    --eager|--deterministic) train+=("$1"); shift; continue ;;
    --dry-run) dry=yes; shift; continue ;;
    -*) [ $# -ge 2 ] || refuse "$1: a value was expected after it" ;;
    *) [ -z "$what" ] || refuse "$what and $1: one preset at a time"
       what=$1; shift; continue ;;
  esac
  value=$2
  case $1 in --results|--figures-dir|--data-dir) [[ $value == /* ]] || value=$from/$value ;; esac
  case $1 in
    --results) train+=("$1" "$value"); drop+=("$1" "$value"); draw+=("$1" "$value") ;;
    --figures-dir) draw+=("$1" "$value") ;;
    --data) data+=("$1" "$value") ;;
    --data-dir) data+=("$1" "$value"); drop+=("$1" "$value") ;;
    --seed|--jobs) train+=("$1" "$value"); drop+=("$1" "$value") ;;
    --device) device=$value; train+=("$1" "$value"); drop+=("$1" "$value") ;;
    *) refuse "unknown option $1; see bash run_all.sh --help" ;;
  esac
  shift 2
done

step=${SLURM_ARRAY_TASK_STEP:-1}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] &&
    [ $(((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / step + 1)) != "$SLURM_ARRAY_TASK_COUNT" ]; then
  refuse "this array of $SLURM_ARRAY_TASK_COUNT tasks has gaps between $SLURM_ARRAY_TASK_MIN and \
$SLURM_ARRAY_TASK_MAX: each task trains one of as many equal parts; submit --array=0-N (finished runs are skipped)"
fi

# --- A Python with the packages ----------------------------------------------------------------

# The active Python is used if it has the five packages in versions that this package was tested with; otherwise a
# .venv with the exact pins is made, once.
requirements=requirements.txt tools=""
[ "$what" = test ] && requirements=tests/requirements.txt tools="pytest xdist ruff"

fits() {                        # or $unfit says why not
  unfit=$("$1" - $tools 2>&1 <<'PYTHON'
import importlib.util, sys
tested = {"torch": ("2.11", "2.11"), "torchvision": ("0.26", "0.26"), "numpy": ("2.0", "2.4"),
          "matplotlib": ("3.9", "3.11"), "yaml": ("6.0", "6.0")}
def release(text):
    return tuple(map(int, text.split(".")[:2]))
for name, (oldest, newest) in tested.items():
    version = importlib.import_module(name).__version__
    if not release(oldest) <= release(version) <= release(newest):
        sys.exit(f"{name} {version} was not tested, {oldest} to {newest} were")
for name in sys.argv[1:]:
    if not importlib.util.find_spec(name):
        sys.exit(f"No module named '{name}'")
PYTHON
  ) && return
  unfit=${unfit##*$'\n'}
  return 1
}

python=""
for candidate in python3 python python3.13 python3.12 python3.11; do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate && break
done
[ -n "$python" ] || refuse "no Python 3.11 or newer was found (python3 here is $(python3 --version 2>&1)): install \
one, from python.org or your system"
venv=$PWD/.venv/bin/python
if fits "$python"; then
  why="the active Python, which has the packages"
else
  if ! fits "$venv"; then
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "the packages are not installed: run \`bash run_all.sh smoke\` in \
$PWD once, before the tasks of an array install them all at once"
    fits "$python"
    echo "setting up .venv with $requirements (a minute or two online, 5 GB): the active Python \
($("$python" --version 2>&1)) does not fit: $unfit"
    { [ -x "$venv" ] || "$python" -m venv --clear --without-pip .venv; } &&
      "$python" -m pip --python "$venv" install --quiet --no-input --disable-pip-version-check -r "$requirements" &&
      { fits "$venv" || { echo "$unfit" >&2; false; }; } || refuse "the packages of $requirements could not be \
installed into .venv: the lines above say why; be online, or activate a Python that has them"
  fi
  python=$venv why=".venv, with the packages of $requirements"
fi

if [ "$what" = test ]; then
  "$python" -m ruff check --quiet . && exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests
  exit 1
fi

# --- The study ---------------------------------------------------------------------------------

asked=${what:+as asked}
what=$("$python" - "$what" "$device" "${train[@]}" "${data[@]}" <<'PYTHON'
import study, presets, sys
def main():
    presets.known(sys.argv[2], ("auto", "cpu", "cuda"), "value of --device")
    presets.load_preset(sys.argv[1] or "paper")
    study.training_parser("").parse_args(sys.argv[3:])
    print(study.choose_preset(sys.argv[1], study.choose_device(sys.argv[2])))
study.command_line(main)
PYTHON
) || exit 2
echo "preset $what, ${asked:-which fits the device; others: bash run_all.sh paper|short|overnight|quick|smoke}"
echo "$("$python" --version): $why"
if [ "$device" = auto ] && nvidia-smi -L >/dev/null 2>&1 &&
    ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  why="torch cannot use this machine's GPU ($(nvidia-smi -L | head -n 1)): its driver may be too old (README, Two \
commands)"
  [[ $what = short || $what = paper ]] && refuse "$why; $what would take months of the CPU: mend this, or add \
--device cpu"
  echo "WARNING: $why. Training runs on the CPU."
fi

# A stage is a process group of its own, so that a signal to this shell reaches all that a stage has started.
stop() {                        # stop SIGNAL STATUS
  [ -z "$group" ] || { kill "-$1" -- "-$group"; wait "$group"; }
  exit "$2"
}
group=""
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop TERM 129' HUP
trap 'stop TERM 131' QUIT
trap '[ -z "$group" ] || kill -TSTP -- "-$group"; kill -STOP $$; [ -z "$group" ] || kill -CONT -- "-$group"' TSTP

failed=()
stage() {                       # stage NAME COMMAND...: a stage that fails does not stop the others
  local name=$1 status; shift
  echo; echo "== $name"
  set -m; "$@" & group=$!; set +m
  while wait "$group"; status=$?; kill -0 "$group" 2>/dev/null; do :; done      # (Ctrl-Z ends a wait)
  group=""
  [ $status = 130 ] || [ $status = 143 ] && exit $status
  [ $status = 0 ] || [ $status = 3 ] || failed+=("$name (exit status $status)")
  return $status
}
mlp=("${data[@]}") cifar=("${data[@]}")         # the functions run in subshells, which exec spares
mlp() { exec "$python" train_mlp_fmnist.py --preset "$what" "${train[@]}" "${mlp[@]}" "$@"; }
densenet() { exec "$python" train_densenet_cifar.py --preset "$what" "${train[@]}" "${cifar[@]}" "$@"; }
convnet() { exec "$python" train_convnet_cifar.py --preset "$what" "${train[@]}" "${cifar[@]}" "$@"; }

if [ -z "$dry" ]; then          # the data first, so that nothing is downloaded while training; status 3: the stand-in
  stage "data: Fashion-MNIST" mlp --fetch
  [ $? = 3 ] && mlp+=(--data synthetic)
  stage "data: CIFAR-100" densenet --fetch
  [ $? = 3 ] && cifar+=(--data synthetic)
fi

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / step))
  train+=(--shard "$part/$SLURM_ARRAY_TASK_COUNT")
  echo; echo "part $part of $SLURM_ARRAY_TASK_COUNT of the runs, by SLURM's array"
else
  plan() { "$1" --dry-run | grep -v '^    '; return "${PIPESTATUS[0]}"; }
  for script in mlp densenet convnet; do stage "plan: $script" plan $script; done
fi
if [ -z "$dry" ]; then
  stage "MLPs on Fashion-MNIST" mlp
  stage "DenseNets on CIFAR-100" densenet
  stage "ConvNets on CIFAR-100" convnet
  if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    stage "robustness" "$python" robustness.py --preset "$what" --figure 7 8 "${drop[@]}"
    stage "figures and verdicts" "$python" report.py --preset "$what" "${draw[@]}"
  fi
fi

echo
if [ ${#failed[@]} = 0 ]; then
  echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
else
  echo "NOT COMPLETE after $((SECONDS / 60)) min $((SECONDS % 60)) s; failed:"
  printf '  %s\n' "${failed[@]}"
  echo "finished runs are kept: the same command goes on with the others"
  exit 1
fi
