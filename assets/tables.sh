#!/bin/sh
# Trains every row of the README's tables, two controls more, and draws its pictures: sh assets/tables.sh [WORLD ...]
#
# The tables are of the worlds 0 and 3 to 9, because settings were chosen on 1 and 2; every seed is its world's number.
# What is finished is not trained again and what was interrupted goes on, so the same command continues. Run folders:
# runs/NAME-WORLD. FLAGS are added to every training: FLAGS="--device cuda" sh assets/tables.sh
# Another length, in run folders and with pictures of its own: STEPS=960 OUT=runs/long sh assets/tables.sh 4 5
set -eu
cd "$(dirname "$0")/.."
worlds=${*:-0 3 4 5 6 7 8 9}
steps=${STEPS:-240} runs=${OUT:-runs} pictures=${OUT:-assets}

train() {  # NAME SCRIPT FLAG ...: one run, unless it is finished
    out=$runs/$1-$w script=$2
    shift 2
    [ -e "$out/result.json" ] && return
    [ ! -e "$out/args.json" ] || set -- "$@" --resume
    python "$script" --toy-world "$w" --seed "$w" --out "$out" "$@" ${FLAGS:-}
}

of() {  # NAME ...: their run folders in all worlds
    for name; do for w in $worlds; do echo "$runs/$name-$w"; done; done
}

for w in $worlds; do
    train source source_only.py
    train oracle source_only.py --oracle
    start="--init $runs/source-$w/last.pt --val-every $((steps / 4))"
    length="--iterations $steps" sdca_length="--iterations $((steps * 2 / 3)) --ssl-iterations $((steps / 3))"
    train plain drsl.py $start $length --plain
    train drsl drsl.py $start $length
    train one_mode drsl.py $start $length --modes 1
    train lse scale_invariant.py $start $length
    train whole scale_invariant.py $start $length --view whole
    train cpsl cpsl.py $start $length
    train held cpsl.py $start $length --hold-prototypes
    train fixed_labels cpsl.py $start $length --no-rectify
    train sdca sdca.py $start $sdca_length
    train no_contrast sdca.py $start $sdca_length --lambda-feat 0 --lambda-out 0
done

# The first table. Then each method against source only and against plain self-training, its host (the idea off) against
# that, and the idea on against off.
python evaluate.py --summary $(of source plain lse cpsl sdca drsl oracle)
for pair in lse:source cpsl:source sdca:source drsl:source \
            lse:plain cpsl:plain sdca:plain drsl:plain \
            whole:plain fixed_labels:plain no_contrast:plain one_mode:plain \
            lse:whole cpsl:fixed_labels cpsl:held sdca:no_contrast drsl:one_mode
do
    echo
    python evaluate.py --summary $(of "${pair%:*}") --against $(of "${pair#*:}")
done

one() {  # NAME ...: their run folders in the first world
    for name; do echo "$runs/$name-${worlds%% *}"; done
}

python assets/figures.py steps $(of source plain lse cpsl sdca drsl oracle) --out "$pictures/steps.png"
python assets/figures.py panel $(one source plain lse cpsl sdca drsl) --out "$pictures/toy.png"
python assets/figures.py flow --out "$pictures/flow.png"
python assets/figures.py idea $(one lse) --out "$pictures/idea_lse.png"
python assets/figures.py idea $(one cpsl) --out "$pictures/idea_cpsl.png"
python assets/figures.py idea $(one sdca no_contrast) --out "$pictures/idea_sdca.png"
python assets/figures.py idea $(one drsl) --out "$pictures/idea_drsl.png"
