# shellcheck shell=bash disable=SC2034  # read by functions.sh
# What the scripts here do, and where. Copy this file, fill it in, and say which one it is:
#
#     cp tpu_scripts/settings.sh my_run.sh; export SETTINGS=$PWD/my_run.sh

# ---- where, and billed to whom

PROJECT=""                    # of Google Cloud, by its id
ZONE=""                       # one that has these TPUs: README.md says how to find it
NAME="jaxup"                  # of the TPUs; one run at a time
TPU="v5p:4x4x4"               # as --target of jaxup.train takes it
CAPACITY="spot"               # spot (cheap, taken away at any time), on-demand, or reservation
RESERVATION=""                # of that one, its name; "" = any that the project has
BUCKET=""                     # gs://NAME, best in the region of ZONE

# ---- what is trained

RUN="tunguska"                # the run's directory is BUCKET/runs/RUN
TRAIN=(                       # what follows `python -m jaxup.train`, but for --workdir
  --config=heal_tunguska.py
  --config.data.files=chats.jsonl
  "--config.data.store=$BUCKET/data/chats"
)
HF_TOKEN_FILE=""              # for a model that asks for one: ~/.cache/huggingface/token

# ---- how it is installed: this clone, at its commit, with the versions of its containers/constraints.txt

PYTHON="3.11"                 # which those are for
EXTRAS="tpu"                  # tpu,lora for :lora
UV="0.13.9"
DISK=40                       # GiB that must be free on each worker; 60 for a model of 44 GB from the Hub

# ---- how long is waited, in seconds, and how often it is started again

RESTARTS=20                   # after preemptions and crashes, by watch.sh
POLL=30                       # between two looks
ANSWER=900                    # for workers to answer, an installation included
GATHER=1900                   # for all workers to come to the preflight

# ---- GKE (gke.sh) and Slurm (slurm.sh)

CLUSTER="$NAME"
IMAGE=""                      # of containers/, pushed where the cluster can pull it
NODES=1                       # of Slurm
GPUS=8                        # of each
