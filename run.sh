#!/bin/sh
# Train on whatever this machine is. Plain POSIX sh.
#   ./run.sh [my.py] [--knob=value ...]     choose data, preset and processes, train my.py (train_gpt.py), sample
#   ./run.sh sample [--prompt=...] ...      text in the words of trained weights, by data/sample.py
#   ./run.sh test [pytest arguments]        run the tests; SCRIPT=my.py ./run.sh test: the script's, on a copy of it
#   ./run.sh trial a.py b.py [--runs 3] ... does b.py help?
#   ./run.sh compare|plot|rerun|verify|list|add|import ...   the other commands of records/records.py
#   ./run.sh help                           this text; --help: and all knobs; COMMAND --help: what else it takes
#   PYTHON=python3 ./run.sh ...             use that interpreter as it is: no .venv, nothing installed
#   NPROC=2 ./run.sh ...                    so many processes; CUDA_VISIBLE_DEVICES limits the GPUs
# Each installs first what it needs and lacks. A given --preset, --data_dir or NPROC wins over the choice made here.
# A path is looked for where you stand, then in the folder of run.sh, which gets .venv, logs and downloads.

say() { (trap '' PIPE; echo "run.sh: $*") 2>/dev/null || :; }  # a closed pipe or a full disk behind it ends nothing
die() { (trap '' PIPE; echo "run.sh: $*" >&2); exit 2; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
words() { sed -n '2,/^$/s/^# \{0,1\}//p' run.sh; }
torch_of() { "$1" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

usable_torch() {  # version -> is it in the range of requirements.txt, and no CPU-only build where there is a GPU?
    case $1 in 2.1[1-4].*+cpu) ! has_gpu ;; 2.1[1-4].*) ;; *) return 1 ;; esac
}

find_python() {  # sets base: the first interpreter that the locked torch has builds for
    found=
    for base in python3 python3.13 python3.12 python3.11 python3.14 python3.10 python; do
        version=$(version_of "$base") || continue
        case $version in 3.10|3.11|3.12|3.13|3.14) return ;; esac
        found="$found, $base is $version"
    done
    die "Python 3.10 to 3.14 is needed${found:-, and there is no python3 on the PATH}."
}

make_venv() {  # it sees the packages of its interpreter only when their torch is to be reused
    find_python
    "$base" -c 'import venv, ensurepip' 2>/dev/null || die "$base lacks venv (on Debian: apt install python3-venv)."
    site='' clear='' torch=$(torch_of "$base")
    if usable_torch "$torch"; then site=--system-site-packages
    elif [ -n "$torch" ]; then say "torch $torch of $base does not suit this project or machine: .venv gets another"; fi
    "$python" -c '' 2>/dev/null || clear=--clear  # a .venv whose interpreter has gone
    "$base" -m venv $clear $site .venv || die "$base could not make .venv (its reason stands above)."
    [ -n "$site" ] && [ -z "$(torch_of .venv/bin/python)" ] || return 0
    # The interpreter was itself in a venv, whose packages a second venv does not see: lead it there.
    "$base" -c 'from importlib.metadata import distribution; print(distribution("torch").locate_file(""))' \
        > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused_torch.pth"
}

check_space() {  # before anything is downloaded
    need=2 free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ -n "$(torch_of "$python")" ] || [ "$(uname -s)" != Linux ]; then :
    elif has_gpu; then need=9
    else say "installing torch with its CUDA libraries: about 3 GB to download, 9 GB of disk ($free GB are free)." \
        "There is no GPU here, so a CPU-only torch would do (0.2 GB to download, 2 GB of disk): to have one reused," \
        "stop now (Ctrl-C) and see \"Sparing the download\" in data/README.md."
    fi
    [ "$free" -ge "$need" ] || die "$need GB of disk are needed for .venv, and only $free GB are free in $PWD."
}

setup() {  # setup train|test: .venv with what training needs, or the tests too; installs only what changed
    python=.venv/bin/python
    wanted=$(cat requirements.txt requirements.lock | cksum)
    [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null && return
    # Until the first installation is done, any torch at hand is one to reuse: the interpreter's, or one put into .venv.
    if ! "$python" -c '' 2>/dev/null || [ ! -e .venv/installed-train ]; then
        [ -n "$(torch_of "$python")" ] || make_venv
        torch_of "$python" > .venv/reused
    fi
    sed '/^# Tests and records/,$d' requirements.txt > .venv/needs.txt
    [ "$1" = train ] || cp requirements.txt .venv/needs.txt
    cp requirements.lock .venv/constraints.txt
    if usable_torch "$(cat .venv/reused)"; then
        say "reusing torch $(cat .venv/reused)"
        sed '/^torch==/d' requirements.lock > .venv/constraints.txt
    fi
    if [ "$(version_of "$python")" = 3.10 ]; then : > .venv/constraints.txt
        say "requirements.lock starts at Python 3.11: installing the newest versions that requirements.txt allows"; fi
    check_space
    if [ -t 1 ]; then quiet=; else quiet=-q; fi
    "$python" -m pip install --disable-pip-version-check $quiet -r .venv/needs.txt -c .venv/constraints.txt ||
        die "pip could not install (see above); PYTHON=python3 ./run.sh uses an interpreter that has the packages."
    for done in train "$1"; do echo "$wanted" > ".venv/installed-$done"; done
}

check_copy() {  # what SCRIPT names, before anything is installed; tests/conftest.py puts it in place of train_gpt.py
    SCRIPT=$(found "$SCRIPT")
    [ -f "$SCRIPT" ] || die "there is no script SCRIPT=$SCRIPT, neither here nor in $PWD."
    for mark in '^class Hyperparameters' '^class GPT(' '^class Muon(' '^def main('; do
        grep -q "$mark" 2>/dev/null < "$SCRIPT" || die "SCRIPT=$SCRIPT is no copy of train_gpt.py."
    done
    say "testing $SCRIPT, by the tests of the script alone"
}

check() {  # ranks [--all] knobs -> does the script take them? It says itself what is wrong
    case $script in */seeds.py) set -- "${TRIAL_SCRIPT:-$script}" "$@" ;; *) set -- "$script" "$@" ;; esac
    "$python" data/check.py "$@"
}

found() {  # path -> what it is called from the folder of run.sh: one that exists where the user stands is meant
    case $1 in /*|'') ;; *)
        [ "$here" = "$PWD" ] || [ ! -e "$here/${1%%::*}" ] || { printf '%s\n' "$here/$1"; return; } ;;
    esac
    printf '%s\n' "$1"
}

nearest() {  # word; candidates from standard input -> the one that takes the fewest edits, of a script without its .py
    word=$1 awk '
        { name = $0; sub(/[.]py$/, "", name); word = substr(ENVIRON["word"], 1, 40); m = length(word); n = length(name)
          for (j = 0; j <= n; j++) d[0, j] = j
          for (i = 1; i <= m; i++) { d[i, 0] = i; for (k = 1; k <= n; k++) {
              edits = d[i - 1, k - 1] + (substr(word, i, 1) != substr(name, k, 1))
              if (d[i - 1, k] + 1 < edits) edits = d[i - 1, k] + 1
              if (d[i, k - 1] + 1 < edits) edits = d[i, k - 1] + 1
              d[i, k] = edits } }
          if (!best || d[m, n] < least) { best = $0; least = d[m, n] } }
        END { print best }'
}

embedded_text() {  # sets data: the prose that comes with numpy, made into shards once
    data=data/embedded
    [ -f $data/manifest.json ] || "$python" data/tokenize_text.py --encoding bytes --out $data || exit
}

fineweb() {  # is it there, or can it be fetched? Shards without a manifest were copied here, or their download was cut.
    [ -f data/fineweb10B/manifest.json ] && return
    "$python" data/fineweb.py; code=$?
    [ $code -lt 128 ] || exit $code  # Ctrl-C means stop, not train on something else
    [ $code -eq 0 ] || ls data/fineweb10B/fineweb_val_*.bin data/fineweb10B/fineweb_train_*.bin >/dev/null 2>&1
}

here=$PWD file=$0
while [ -h "$file" ]; do  # a symbolic link; POSIX has no other word for where it leads
    link=$(ls -ld "$file") link=${link#*"$file -> "}
    case $link in /*) file=$link ;; *) file=$(dirname "$file")/$link ;; esac
done
CDPATH='' cd -- "$(dirname "$file")" || exit 2
# torch puts these paths into compilers' commands unquoted: where a space would cut them, its own default places serve.
case $PWD in *[!A-Za-z0-9_./@%+=:,~-]*) ;; *)
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR-$PWD/.cache/inductor}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR-$PWD/.cache/triton}" ;;
esac
export TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD="${TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD-1}"

mode=train needs=train script=train_gpt.py preset='' data=''
case ${1---} in  # nothing at all counts as a knob
    --*|-h) ;;
    help) words; exit ;;
    *.py) script=$(found "$1"); shift ;;
    test) mode=test needs=test; shift ;;
    sample) mode=tool tool=data/sample.py; shift ;;
    list) mode=tool tool="records/records.py list"; shift ;;  # the others need scipy or matplotlib
    trial|compare|plot|rerun|verify|add|import) mode=tool needs=test tool="records/records.py $1"; shift ;;
    *=*) die "'$1' is no command, script.py or --knob=value: a knob is written --${1#-}." ;;
    *) close=$({ printf '%s\n' test trial compare plot rerun verify list add import sample help *.py
                cd "$here" && ls -d -- *.py 2>/dev/null; } | nearest "$1")
        die "'$1' is no command, script.py or --knob=value: the nearest is $close, and ./run.sh help names all." ;;
esac
before=''
for word in "$@"; do shift
    case $before in
        -k|-m|--prompt|--name|--author|--summary) ;;  # a text, even where a file is called so
        --out) case $word in /*) ;; *) word=$here/$word ;; esac ;;
        *) case $word in
            --resume=latest|--weights=latest|--out=/*) ;;
            --out=?*) word=--out=$here/${word#*=} ;;
            --data=*|--data_dir=*|--[ab].data_dir=*|--resume=*|--weights=*|--bpe[_-]file=*)
                word=${word%%=*}=$(found "${word#*=}") ;;
            -*|latest) ;;
            *) word=$(found "$word") ;;
        esac ;;
    esac
    before=$word; set -- "$@" "$word"
done
case $PYTHON in */*) PYTHON=$(found "$PYTHON") ;; esac
[ $mode != train ] || [ -f "$script" ] || die "there is no script $script."
[ $mode != test ] || [ -z "$SCRIPT" ] || check_copy
python=$PYTHON given_preset='' given_data='' help=''
for argument in "$@"; do case $argument in
    --help|-h) help=1 ;;
    --preset=*) preset=${argument#*=} given_preset=1 ;;
    --data_dir=*) data=${argument#*=} given_data=1 ;;
esac; done
if [ -n "$python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "PYTHON=$PYTHON is not a Python of version 3.10 or newer."
    [ -n "$(torch_of "$python")" ] || die "PYTHON=$PYTHON has no torch, and nothing is installed when PYTHON is set."
fi
if [ $mode = train ]; then  # before anything is installed or fetched
    case ${NPROC:-1} in *[!0-9]*|0*|????*) die "NPROC=$NPROC is no count of processes." ;; esac
    [ -n "$python" ] || python=.venv/bin/python
    "$python" -c '' 2>/dev/null || { find_python; python=$base; }
    [ -z "$help" ] || { words; echo; check --help && exit; }
    [ -n "$help" ] || check "${NPROC:-1}" "$@" || exit
fi
if [ -n "$PYTHON" ]; then python=$PYTHON
elif [ $mode = tool ]; then setup $needs >&2  # its standard output may go into a file or a pipe
else setup $needs; fi
case $mode in tool) exec "$python" $tool "$@" ;; test) exec "$python" -m pytest -q "$@" ;; esac
[ -z "$help" ] || exec "$python" "$script" "$@"
# nvidia-smi answers at once; torch takes seconds, and is asked where it may see fewer GPUs than nvidia-smi lists.
answer='' seen=${CUDA_VISIBLE_DEVICES+set}
case $(torch_of "$python") in *+cpu) seen=cpu ;; esac
[ -n "$seen" ] || answer=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    awk '/^[0-9]+$/ { n++; if (!least || $1 < least) least = $1 } END { if (n) print n, least }')
[ -n "$answer" ] || answer=$("$python" -c 'import torch
n = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(n, min([torch.cuda.get_device_properties(i).total_memory >> 20 for i in range(n)], default=0))') ||
    die "$python cannot use its torch (the reason stands above); without .venv, ./run.sh installs one anew."
gpus=${answer% *} mib=${answer#* } processes=1
if [ "$gpus" -eq 0 ]; then
    [ -n "${CUDA_VISIBLE_DEVICES+set}" ] || ! has_gpu || say "torch $(torch_of "$python") cannot use this machine's GPU"
    preset=${preset:-cpu} machine="no GPU"; export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-PASSIVE}"  # others may be at work
else
    case $gpus in 1) ;; 2|3) processes=2 ;; 4|5|6|7) processes=4 ;; *) processes=8 ;; esac
    [ "$gpus" -eq $processes ] || say "using $processes of $gpus GPUs: a step's 8 sequences divide among 1, 2, 4 or 8"
    [ -n "$PYTORCH_CUDA_ALLOC_CONF" ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-expandable_segments:True}"
    export NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER-0}"  # which may not keep such memory in a CUDA graph
    if [ "$mib" -ge 76800 ]; then fits=80gb; elif [ "$mib" -ge 38912 ]; then fits=40gb; else fits=24gb; fi
    [ "$mib" -ge 22528 ] || [ -n "$preset" ] || say "$((mib / 1024)) GiB are less than any preset was measured on:" \
        "if memory runs out, see \"Presets\" in data/README.md, or take --preset=tiny"
    preset=${preset:-$fits} machine="$gpus GPUs of at least $((mib / 1024)) GiB"
fi
case $preset in cpu|tiny|eighth|long|quick) processes=1 ;; esac  # their steps have few sequences
processes=${NPROC:-$processes}
[ "$gpus" -eq 0 ] || [ $processes -le "$gpus" ] || die "NPROC=$NPROC is more than the $gpus GPUs that torch sees."
check $processes "--preset=$preset" "$@" || exit
[ -n "$given_data" ] || case $preset in
    cpu|tiny) embedded_text ;;
    *) data=data/fineweb10B
        fineweb || {
            [ -z "$given_preset" ] || die "--preset=$preset needs FineWeb, or other data named by --data_dir=DIR."
            say "FineWeb is not here and cannot be fetched: a tiny model learns the text that comes with numpy instead"
            preset=tiny processes=${NPROC:-1}; embedded_text; } ;;
esac
say "$machine, processes: $processes, preset: $preset, data: $data"
[ -n "$given_data" ] || set -- "--data_dir=$data" "$@"
[ -n "$given_preset" ] || set -- "--preset=$preset" "$@"
# torchrun makes any exit code 1 and of a sentence a page: what can be refused is, before it. One process needs neither.
[ $processes -eq 1 ] || check $processes --all "$@" || exit
set -- "$script" "$@"
if [ $processes -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS-$((($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes))}"
    set -- -m torch.distributed.run --standalone --nproc_per_node=$processes "$@"
fi
exec "$python" data/then_sample.py "$python" "$@"
