#!/usr/bin/env bash
# Measures on one NVIDIA GPU what docs/performance.md lacks, in eight minutes.
#
#   benchmarks/gpu.sh                  all parts, the most valuable first, until the time is over
#   benchmarks/gpu.sh compiled         the parts that are named, such as one that was left out
#   benchmarks/gpu.sh --rehearse       the same programs on a CPU, with tiny networks
#   benchmarks/gpu.sh --show           the command lines alone
#
# people     a training step of 1, 8, 4 and 2 people: people/hour, bytes, 320 steps from the step
# picture    one picture: the time, the kernels and the gaps between them; without command buffers
# person     whole jobs: 25 steps with nothing compiled and again, 320 steps, a first picture twice
# eager      a step and its memory against eager PyTorch
# enhancer   a step of the shared ID-Enhancer: samples a second
# attention  a step and a picture without cuDNN's attention
# loops      one picture with its loop in a command buffer
# compiled   a step against compiled PyTorch, which is waited for 300 s at most
#
# Each command has a limit of its own, and all have BENCH_SECONDS (480), with which the limits grow.
# What is measured is written at once: parts.jsonl says how each command ended, PART.txt holds its
# numbers, PART.log the rest.
#
# Variables: BENCH_OUT, the folder of reports (outputs/gpu); BENCH_WORK, that of inputs and compiled
# programs, which a second run finds there (outputs/gpu-work); PYTHON.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

all=(people picture person eager enhancer attention loops compiled)
total=${BENCH_SECONDS:-480} python=${PYTHON:-} kind=gpu shown=
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
chosen=()
for word in "$@"; do
  case $word in
    --rehearse) kind=cpu ;;
    --show) shown=yes ;;
    *)
      if [[ " ${all[*]} " != *" $word "* ]]; then
        echo "error: $word is no part; expected --rehearse, --show or some of ${all[*]}" >&2
        exit 2
      fi
      chosen+=("$word")
      ;;
  esac
done
if [ ${#chosen[@]} = 0 ]; then chosen=("${all[@]}"); fi

out=$(realpath -m "${BENCH_OUT:-outputs/$kind}")
work=$(realpath -m "${BENCH_WORK:-outputs/$kind-work}")
inputs=$work/inputs programs=$work/programs
if [ $kind = gpu ]; then
  networks=(--model sd21 --mixed_precision bf16)
  workload=sd21 sizes=(8 32 bfloat16) platform=cuda steps=50 people=(1 8 4 2) batch=8 samples=(32 64)
  few=25 many=320 precision=bf16
else
  networks=(--model tiny)
  workload=tiny sizes=(2 2 float32) platform=cpu steps=2 people=(1 2) batch=2 samples=(2)
  few=2 many=3 precision=no
fi

# One command: run PART WHAT LIMIT [VARIABLE=VALUE ...] COMMAND ..., the limit in seconds of 480.
failed=0
run() {
  local part=$1 what=$2 limit=$(($3 * total / 480)) left=$((total - SECONDS))
  local began=$SECONDS code=left_out
  shift 3
  if [ $shown ]; then
    printf '%q ' env "$@"
    echo
    return
  fi
  if [ "$limit" -gt $((left - 5)) ]; then limit=$((left - 5)); fi
  if [ "$limit" -ge 20 ]; then
    timeout --foreground --kill-after=15 "$limit" env "$@" 2>>"$out/$part.log" |
      tee -a "$out/$part.txt"
    code=${PIPESTATUS[0]}
  fi
  # 124 and 137: its time was over.
  if [ $code != 0 ]; then failed=1; fi
  printf '{"part": "%s", "what": "%s", "limit_s": %d, "seconds": %d, "ended": "%s"}\n' \
    "$part" "$what" "$limit" $((SECONDS - began)) "$code" | tee -a "$out/parts.jsonl"
}

one=(JAX_PLATFORMS=$platform CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}")
kept=("${one[@]}" JAX_COMPILATION_CACHE_DIR="$programs/jax")
model=(--pretrained_model_name_or_path "$inputs/checkpoint" --mixed_precision $precision)
model+=(--compile_cache "$work/jobs/programs")

drawing=("${kept[@]}" "$python" -m benchmarks.picture "${networks[@]}" --steps $steps)

people() {
  run people "people in a step" 160 "${kept[@]}" "$python" -m benchmarks.identities \
    "${networks[@]}" --people "${people[@]}" --devices 1 --batch $batch --repeats 3
}

learn() { # WHAT LIMIT STEPS
  run person "$1" "$2" "${one[@]}" "$python" train_jax.py "${model[@]}" --profile paper \
    --enhancer none --train_data_dir "$work/photos" --crop none --train_batch_size $batch \
    --max_train_steps "$3" --report_to none --output_dir "$work/jobs/$1"
}

draw() { # WHAT LIMIT
  run person "$1" "$2" "${one[@]}" "$python" sample_jax.py "${model[@]}" \
    --identity "$work/jobs/few_first/identity.safetensors" --prompt "a photo of {} person" \
    --num_inference_steps $steps --num_images_per_prompt 1 --save_dir "$work/jobs/$1"
}

person() {
  if [ ! $shown ]; then
    rm -rf "$work/jobs" # the first job is one with nothing compiled
    mkdir -p "$work/photos" && cp "$inputs/photo.png" "$work/photos/"
  fi
  learn few_first 120 $few
  learn few_again 60 $few
  learn many_again 90 $many
  draw picture_first 80
  draw picture_again 40
}

picture() {
  run picture "one picture" 90 "${drawing[@]}"
  run picture "without command buffers" 70 \
    XLA_FLAGS="--xla_gpu_enable_command_buffer=" "${drawing[@]}"
}

loops() {
  run loops "with loops in command buffers" 70 \
    XLA_FLAGS="--xla_gpu_enable_command_buffer=+WHILE" "${drawing[@]}"
}

against() { # STACK LIMIT PATIENCE
  local mode=()
  if [ "$1" = compiled ]; then mode=(--torch_compile default); fi
  run "$1" "a step against $1" "$2" "$python" -m benchmarks --workload $workload --device $kind \
    --stacks jax "$1" --parts train "${mode[@]}" --repeats 5 --patience $(($3 * total / 480)) 1 \
    --inputs "$inputs" --compile_cache "$programs" --out "$out" --name "$workload-$kind-$1"
}

eager() { against eager 130 60; }

enhancer() {
  run enhancer "steps of the enhancer" 130 "${kept[@]}" "$python" -m benchmarks.enhancer \
    "${networks[@]}" --batch "${samples[@]}" --repeats 3
}

attention() {
  run attention "a step without cuDNN" 90 "${kept[@]}" "$python" -m benchmarks.identities \
    "${networks[@]}" --attention xla --people 1 --devices 1 --batch $batch --repeats 3
  run attention "a picture without cuDNN" 70 "${drawing[@]}" --attention xla
}

compiled() {
  local left=$(((total - SECONDS) * 480 / total)) patience=300
  if [ $left -lt 375 ]; then patience=$((left > 95 ? left - 75 : 20)); fi
  against compiled $((patience + 70)) $patience
}

prepare=(JAX_PLATFORMS=cpu "$python" -m benchmarks.workloads $workload "$inputs" "${sizes[@]}")
if [ $shown ]; then
  printf '%q ' env "${prepare[@]}"
  echo
  for part in "${chosen[@]}"; do $part; done
  exit 0
fi
if [ $kind = gpu ] && ! command -v nvidia-smi >/dev/null; then
  echo "error: no NVIDIA GPU is here; benchmarks/gpu.sh --rehearse runs on a CPU" >&2
  exit 1
fi
mkdir -p "$out" "$work" || exit 1
trap 'exit 130' INT
trap 'exit 143' TERM
for part in "${chosen[@]}"; do rm -f "$out/$part".*; done
# The checkpoint is written on the CPU while the first part, which needs none, compiles.
writing=
if [[ " ${chosen[*]} " =~ " person "|" eager "|" compiled " ]] && [ ! -f "$inputs/workload.json" ]; then
  rm -rf "$inputs"
  timeout --kill-after=10 $((200 * total / 480)) nice env "${prepare[@]}" >"$out/prepare.log" 2>&1 &
  writing=$!
fi
for part in "${chosen[@]}"; do
  if [ $writing ] && [[ " person eager compiled " == *" $part "* ]]; then
    wait $writing || echo "error: no inputs were written, see $out/prepare.log" >&2
    writing=
  fi
  $part
done
if [ $writing ]; then wait $writing; fi
echo "$SECONDS s in all; the reports are in $out"
exit $failed
