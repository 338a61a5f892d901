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

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
[ -f "$here/common.py" ] || here=${SLURM_SUBMIT_DIR:-$here}     # sbatch runs a copy from elsewhere
[ -f "$here/common.py" ] || refuse "$here is not the package's folder: call this script, or sbatch, in that folder"

# --- What is asked for: each script gets the options that it knows -------------------------------

what="" dry="" train=() drop=() draw=()
while [ $# -gt 0 ]; do
  [[ $1 == --*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  option=("$1"); shift
  while [[ $option == --* && $# -gt 0 && $1 != --* ]]; do option+=("$1"); shift; done
  case $option in
    -h|--help) sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$here/run_all.sh"; exit 0 ;;
    --dry-run) [ ${#option[@]} = 1 ] || refuse "${option[1]}: the preset comes first, before the options"
       dry=yes ;;
    --figures-dir|--results|--data-dir) [ ${#option[@]} = 2 ] || refuse "$option: one folder was expected" ;;&
    --figures-dir) draw+=("${option[@]}") ;;
    --results) train+=("${option[@]}") drop+=("${option[@]}") draw+=("${option[@]}") ;;
    --data-dir|--device|--seed|--jobs) train+=("${option[@]}") drop+=("${option[@]}") ;;
    --*) train+=("${option[@]}") ;;
    *) [ -z "$what" ] || refuse "$what and $option: one preset at a time, before the options"
       what=$option ;;
  esac
done

# --- A Python with the packages: the active one, or a .venv with the pins ------------------------

python=python3 requirements=$here/requirements.txt packages="torch, torchvision, numpy, matplotlib, yaml"
[ "$what" != test ] || requirements=$here/tests/requirements.txt packages+=", pytest, xdist"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || refuse "Python 3.11 or newer was expected, and \
python3 is $(python3 --version 2>&1): install or activate one"
if ! missing=$(python3 -c "import $packages" 2>&1); then
  python=$here/.venv/bin/python
  if ! "$python" -c "import $packages" 2>/dev/null; then
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "the packages are not installed: run \`bash run_all.sh smoke\` once, \
before the tasks of an array install them all at once"
    echo "setting up .venv with $requirements (a minute or two online, 5 GB): ${missing##*$'\n'}"
    python3 -m venv "$here/.venv" && "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
      refuse "the packages of $requirements could not be installed into .venv: the lines above say why"
  fi
fi
[ "$what" != test ] || exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$here/tests"

# --- The study -----------------------------------------------------------------------------------

what=$(PYTHONPATH=$here "$python" - ${what:+--preset "$what"} "${train[@]}" <<'PYTHON'
from study import command, plan
def main():
    args = command.training_parser("").parse_args()
    preset = command.choose_preset(args.preset, command.choose_device(args.device, args.jobs))
    plan.load_preset(preset)
    print(preset)
command.command_line(main)
PYTHON
) || exit 2
echo "preset $what (others: bash run_all.sh paper|short|overnight|quick|smoke), $("$python" --version), $python"
! nvidia-smi -L >/dev/null 2>&1 || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  echo "WARNING: torch cannot use this machine's GPU (is its driver too old?): training runs on the CPU"

# A stage is a process group of its own, so that a signal to this shell reaches all that a stage has started.
group="" failed=() mlp=() cifar=()       # mlp, cifar: more options, by data set
stop() { [ -z "$group" ] || { kill "-$1" -- "-$group"; wait "$group"; }; exit "$2"; }     # stop SIGNAL STATUS
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop TERM 129' HUP
stage() {                       # stage NAME COMMAND...: a stage that fails does not stop the others
  echo; echo "== $1"
  set -m; "${@:2}" & group=$!; set +m
  wait "$group"; status=$? group=""
  [ $status = 130 ] || [ $status = 143 ] && exit $status
  [ $status = 0 ] || [ $status = 3 ] || failed+=("$1 (exit status $status)")
  return $status
}
train() { exec "$python" "$here/train_$1.py" --preset "$what" "${train[@]}" "${@:2}"; }
plan() { train "$1" --dry-run | grep -v '^    '; return "${PIPESTATUS[0]}"; }

if [ -z "$dry" ]; then          # the data first, so that nothing is downloaded while training; status 3: the stand-in
  stage "data: Fashion-MNIST" train mlp_fmnist --fetch
  [ $? != 3 ] || mlp=(--data synthetic)
  stage "data: CIFAR-100" train densenet_cifar --fetch
  [ $? != 3 ] || cifar=(--data synthetic)
fi
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
  train+=(--shard "$part/$SLURM_ARRAY_TASK_COUNT")
  echo; echo "part $part of $SLURM_ARRAY_TASK_COUNT of the runs, by SLURM's array"
else
  for script in mlp_fmnist densenet_cifar convnet_cifar; do stage "plan: $script" plan "$script"; done
fi
[ -z "$dry" ] || exit $((${#failed[@]} > 0))

stage "MLPs on Fashion-MNIST" train mlp_fmnist "${mlp[@]}"
stage "DenseNets on CIFAR-100" train densenet_cifar "${cifar[@]}"
stage "ConvNets on CIFAR-100" train convnet_cifar "${cifar[@]}"
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  stage "robustness" "$python" "$here/robustness.py" --preset "$what" --figure 7 8 "${drop[@]}"
  stage "figures and verdicts" "$python" "$here/make_figures.py" --preset "$what" "${draw[@]}"
fi

echo
[ ${#failed[@]} != 0 ] || { echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"; exit; }
printf '%s\n' "NOT COMPLETE after $((SECONDS / 60)) min $((SECONDS % 60)) s; failed:" "${failed[@]/#/  }" \
  "finished runs are kept: the same command goes on with the others"
exit 1
