#!/bin/sh
# Trains every row of the README's tables and draws its pictures: sh assets/tables.sh [WORLD ...]
#
# The tables are of the worlds 0 and 3 to 9, because settings were chosen on 1 and 2; every seed is its world's number.
# What is finished is not trained again and what was interrupted goes on, so the same command continues. Run folders:
# runs/NAME-WORLD. FLAGS are added to every training: FLAGS="--device cuda" sh assets/tables.sh
set -eu
cd "$(dirname "$0")/.."
worlds=${*:-0 3 4 5 6 7 8 9}

train() {  # NAME SCRIPT FLAG ...: one run, unless it is finished
    out=runs/$1-$w script=$2
    shift 2
    [ -e "$out/result.json" ] && return
    [ ! -e "$out/args.json" ] || set -- "$@" --resume
    python "$script" --toy-world "$w" --seed "$w" --out "$out" "$@" ${FLAGS:-}
}

of() {  # NAME ...: their run folders in all worlds
    for name; do for w in $worlds; do echo "runs/$name-$w"; done; done
}

for w in $worlds; do
    train source source_only.py
    train oracle source_only.py --oracle
    start="--init runs/source-$w/last.pt"
    train plain drsl.py $start --plain --val-every 60
    train drsl drsl.py $start --val-every 60
    train one_mode drsl.py $start --modes 1
    train lse scale_invariant.py $start --val-every 60
    train whole scale_invariant.py $start --view whole
    train both scale_invariant.py $start --view both
    train cpsl cpsl.py $start --val-every 60
    train held cpsl.py $start --hold-prototypes
    train uniform cpsl.py $start --marginal uniform
    train fixed_labels cpsl.py $start --no-rectify
    train sdca sdca.py $start --val-every 60
    train no_contrast sdca.py $start --lambda-feat 0 --lambda-out 0
    train steps sdca.py $start --lambda-feat 0 --lambda-out 0 --lambda-lov 0 --no-ssl
done

# The first table, and SDCA's source steps alone. Then each method against plain self-training, its host (the idea off)
# against that, and the idea on against off.
python evaluate.py --summary $(of source plain lse cpsl sdca drsl oracle)
echo
python evaluate.py --summary $(of steps)
for pair in lse:plain cpsl:plain sdca:plain drsl:plain \
            whole:plain fixed_labels:plain no_contrast:plain \
            lse:whole both:whole cpsl:fixed_labels cpsl:held cpsl:uniform sdca:no_contrast drsl:one_mode one_mode:plain
do
    echo
    python evaluate.py --summary $(of "${pair%:*}") --against $(of "${pair#*:}")
done

first=${worlds%% *}
python assets/figures.py steps $(of source plain lse cpsl sdca drsl oracle) --out assets/steps.png
python assets/figures.py panel runs/source-$first runs/plain-$first runs/lse-$first runs/cpsl-$first runs/sdca-$first \
    runs/drsl-$first --out assets/toy.png
python assets/figures.py flow --out assets/flow.png
python assets/figures.py idea runs/lse-$first --out assets/idea_lse.png
python assets/figures.py idea runs/cpsl-$first --out assets/idea_cpsl.png
python assets/figures.py idea runs/sdca-$first runs/no_contrast-$first --out assets/idea_sdca.png
python assets/figures.py idea runs/drsl-$first --out assets/idea_drsl.png
