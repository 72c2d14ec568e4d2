#!/bin/sh
# Tune every optimizer at two widths and two lengths of run: 16 searches of 10 trials. Run it in the repository's root.
# Each search leaves its trials, and its best one as a variant of the study. Repeated, it runs what is missing.
set -e
mkdir -p experiments/optimizers/trials
for steps in 100 400; do
  for width in 64 128; do
    for optimizer in adamw muon adafactor schedule_free; do
      cell=${optimizer}_${width}_${steps}
      rates=1e-3,1e-1
      [ $optimizer != adafactor ] || rates=1e-2,1
      python train.py -m hparams_search=optimizers hydra.sweeper.study_name=$cell wandb=off \
        train.optimizer=$optimizer model.d_model=$width train.max_steps=$steps \
        "train.learning_rate=tag(log,interval($rates))"
      cp outputs/sweeps/$cell/trials.csv experiments/optimizers/trials/$cell.csv
      sed "s/+$cell=best/+optimizers=$cell/; s/^name: .*/name: width_$width.steps_$steps/" outputs/sweeps/$cell/best.yaml \
        >experiments/optimizers/$cell.yaml
    done
  done
done
