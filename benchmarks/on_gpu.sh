#!/usr/bin/env bash
# Everything that only a CUDA device can tell, unattended; results go to benchmarks/results/.
cd "$(dirname "$0")/.." || exit 1
results=benchmarks/results
mkdir -p "$results"
khanhllm bench --out "$results/bench-cuda.json"
khanhllm bench step --machine.precision tf32 --out "$results/bench-cuda-tf32.json"
python benchmarks/grouped_gemm.py
python benchmarks/memory_cap.py
python benchmarks/plan_accuracy.py
python benchmarks/precision_ladder.py
