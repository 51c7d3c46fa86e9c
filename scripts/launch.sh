# Sourced by the wrappers: `launch SCRIPT.py ARGUMENT... -- "$@"` runs one trainer through accelerate.
#
# What stands before the `--` is the wrapper's own: it yields to what its user says, on the command line or in a --config.
#
#   NUM_PROCESSES=2            processes on this machine (default: one per GPU; without a GPU one, and two for TINY=1)
#   ACCELERATE_ARGS="..."      handed to `accelerate launch` instead of the defaults, e.g. --config_file scripts/accelerate/...
#   PRINT_COMMAND=1            print the program and its arguments, those of one process, instead of running it
#   VENV=PATH                  environment to use (default: .venv if it is there, else the active one)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}
if [ -x "$VENV/bin/python" ]; then export PATH="$(cd "$VENV" && pwd)/bin:$PATH"; fi

# Stops with one line where Python would end in a traceback: without torch nothing of requirements.txt is there.
require_torch() {
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null && return
  echo "error: no Python with PyTorch is active, and there is none in $VENV. bash scripts/quickstart.sh makes the environment; or name yours: VENV=/path/to/environment bash $0" >&2
  exit 1
}

count_gpus() {
  local gpus
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true) # without nvidia-smi: 0, and no stop by pipefail
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # empty or -1: none of them
    gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '^ *[^ -]' || true)
  fi
  echo "$gpus"
}

# Processes of a tiny recipe: on a CPU two of one thread, since the layers are too small to be divided among threads. Wrappers give each
# of them half of the batch, so the result is the same.
tiny_processes() {
  if [ -n "${NUM_PROCESSES:-}" ]; then echo "$NUM_PROCESSES"
  elif [ -z "${ACCELERATE_ARGS:-}" ] && [ "$(count_gpus)" -eq 0 ] && [ "$(nproc 2>/dev/null || echo 1)" -ge 2 ]; then echo 2
  else echo 1; fi
}

# Processes that the launcher has started. A slim container may lack pgrep, another system /proc.
trainers() { pgrep -P "$launcher" 2>/dev/null || cat /proc/"$launcher"/task/*/children 2>/dev/null || true; }

# On SIGTERM, which the launcher does not pass on: the trainers save and exit with 0. It may have none yet.
terminate() {
  local below
  below=$(trainers)
  kill -TERM ${below:-"$launcher"} 2>/dev/null || true
}

# On Ctrl-C. A trainer that catches it (SigCgt: bit 2) has begun and will save: one hears it by itself, several have sessions of their own.
# Before that there is nothing to save, and launcher and trainers end at once, without reports of each other's end.
interrupt() {
  local below trainer caught begun=
  if [ ! -r "/proc/$launcher/status" ] || ! { command -v pgrep > /dev/null || [ -r "/proc/$launcher/task/$launcher/children" ]; }; then # nobody knows: torchrun passes it on
    if [ "$processes" -gt 1 ]; then kill -TERM "$launcher" 2>/dev/null || true; fi
    return 0
  fi
  below=$(trainers)
  for trainer in $below; do
    caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$trainer/status" 2>/dev/null || true)
    if [ $((16#${caught:-0} & 2)) -ne 0 ]; then begun="$begun $trainer"; fi
  done
  if [ -z "$begun" ]; then
    echo "interrupted before the first step; what is cached stays" >&2
    kill -TERM $below 2>/dev/null || true
    kill -KILL "$launcher" 2>/dev/null || true
    stopped=130
  elif [ "$processes" -gt 1 ]; then kill -INT $begun 2>/dev/null || true; fi # one that has not begun yet hears of it from these
}

launch() {
  local script=$1 gpus processes launcher status stopped=; shift
  if [ "${!#}" = -- ]; then set -- "${@:1:$#-1}"; fi
  if [ "${PRINT_COMMAND:-}" = 1 ]; then printf '%q ' python "$script" "$@"; echo; return; fi
  require_torch
  gpus=$(count_gpus)
  processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
  if [[ "${ACCELERATE_ARGS:-}" =~ --num_processes[\ =]+([0-9]+) ]]; then processes=${BASH_REMATCH[1]}; fi
  case " $* " in *" --dry_run "*) exec python "$script" "$@" ;; esac

  # Arguments are checked in plain Python first: through the launcher a wrong flag would answer after 11 s, with a traceback.
  WORLD_SIZE=$processes python -c 'import importlib, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.argv[0] = sys.argv[1]; importlib.import_module(sys.argv.pop(1)[:-3]).parse_args()' "$script" "$@" || exit $?

  if [ -z "${ACCELERATE_ARGS:-}" ]; then
    ACCELERATE_ARGS="--num_processes $processes --num_machines 1 --mixed_precision no --dynamo_backend no"
    if [ "$processes" -gt 1 ]; then
      ACCELERATE_ARGS="--multi_gpu $ACCELERATE_ARGS"
      # Without this, accelerate runs a single process on a machine that has no GPU.
      if [ "$gpus" -eq 0 ]; then export ACCELERATE_USE_CPU=true; fi
    fi
  fi

  # Several processes: torchrun kills after 30 s what still writes its checkpoint, and would answer Ctrl-C with a traceback of its own.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
  export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGHUP,SIGQUIT}
  # --quiet: the last line of a failed run is its own error, not the launcher's.
  # shellcheck disable=SC2086  # ACCELERATE_ARGS is a list of words
  accelerate launch --quiet $ACCELERATE_ARGS "$script" "$@" &
  launcher=$!
  trap terminate TERM
  trap interrupt INT
  while true; do
    wait "$launcher" 2>/dev/null && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || break
  done
  return "${stopped:-$status}"
}
