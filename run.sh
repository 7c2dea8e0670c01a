#!/bin/sh
# Train on whatever this machine is. Plain POSIX sh.
#   ./run.sh [script.py] [--knob=value ...]   choose data, preset and processes, train, sample; --help lists the knobs
#   ./run.sh trial a.py b.py [--runs 3] ...   does b.py help? Another command of records/records.py instead of trial:
#                                             compare, plot, rerun, verify, list, add, import; --help explains each
#   ./run.sh sample [--prompt=...] ...        text in the words of trained weights, by data/sample.py
#   ./run.sh test [pytest arguments]          run the tests
#   SCRIPT=my.py ./run.sh test ...            run those of the script on my.py, a copy of train_gpt.py
#   PYTHON=python3 ./run.sh ...               use that interpreter as it is: no .venv, nothing installed
# Each installs first what it needs and lacks. Paths start at this folder, wherever you stand.
# A given --preset, --data_dir or NPROC=count wins over the choice made here; CUDA_VISIBLE_DEVICES limits the GPUs.

say() { echo "run.sh: $*"; }
die() { echo "run.sh: $*" >&2; exit 2; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
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
    [ -f "$SCRIPT" ] || die "there is no script SCRIPT=$SCRIPT (paths start at $PWD)."
    for mark in '^class Hyperparameters' '^class GPT(' '^class Muon(' '^def main('; do
        grep -q "$mark" 2>/dev/null < "$SCRIPT" || die "SCRIPT=$SCRIPT is no copy of train_gpt.py."
    done
    say "testing $SCRIPT, by the tests of the script alone"
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

cd "$(dirname "$0")" || exit 2
# torch puts these paths into compilers' commands unquoted: where a space would cut them, its own default places serve.
case $PWD in *[!A-Za-z0-9_./@%+=:,~-]*) ;; *)
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR-$PWD/.cache/inductor}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR-$PWD/.cache/triton}" ;;
esac
export TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD="${TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD-1}"

mode=train needs=train script=train_gpt.py preset='' data=''
case ${1---} in  # nothing at all counts as a knob
    --*|-h) ;;
    *.py) script=$1; shift ;;
    test) mode=test needs=test; shift ;;
    sample) mode=tool; shift; set -- data/sample.py "$@" ;;
    list) mode=tool; set -- records/records.py "$@" ;;  # the others need scipy or matplotlib
    trial|compare|plot|rerun|verify|add|import) mode=tool needs=test; set -- records/records.py "$@" ;;
    *=*) die "'$1' is no command, script.py or --knob=value: a knob is written --${1#-}." ;;
    *) close=$(printf '%s\n' test trial compare plot rerun verify list add import sample --help *.py | nearest "$1")
        die "'$1' is no command, script.py or --knob=value: the nearest is $close, and the top of run.sh names all." ;;
esac
[ $mode != train ] || [ -f "$script" ] || die "there is no script $script."
[ $mode != test ] || [ -z "$SCRIPT" ] || check_copy
python=$PYTHON
if [ -z "$python" ] && [ $mode = tool ]; then setup $needs >&2  # its standard output may go into a file or a pipe
elif [ -z "$python" ]; then setup $needs; else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "PYTHON=$PYTHON is not a Python of version 3.10 or newer."
    [ -n "$(torch_of "$python")" ] || die "PYTHON=$PYTHON has no torch, and nothing is installed when PYTHON is set."
fi
case $mode in tool) exec "$python" "$@" ;; test) exec "$python" -m pytest -q "$@" ;; esac
for argument in "$@"; do case $argument in
    --help|-h) exec "$python" "$script" "$@" ;;
    --preset=*) preset=${argument#*=} ;;
    --data_dir=*) data=${argument#*=} ;;
esac; done
given_preset=$preset given_data=$data
[ -z "$preset" ] || "$python" "$script" --help 2>/dev/null | grep -qF -- "  --preset=$preset " ||
    exec "$python" "$script" "$@"  # which refuses it
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
    if [ "$mib" -ge 76800 ]; then fits=80gb; elif [ "$mib" -ge 38912 ]; then fits=40gb; else fits=24gb; fi
    [ "$mib" -ge 22528 ] || [ -n "$preset" ] || say "$((mib / 1024)) GiB are less than any preset was measured on:" \
        "if memory runs out, lower --train_seq_len and --val_seq_len, or take --preset=tiny"
    preset=${preset:-$fits} machine="$gpus GPUs of at least $((mib / 1024)) GiB"
fi
[ -n "$data" ] || case $preset in
    cpu|tiny) embedded_text ;;
    *) data=data/fineweb10B
        fineweb || {
            [ -z "$given_preset" ] || die "--preset=$preset needs FineWeb, or other data named by --data_dir=DIR."
            say "FineWeb is not here and cannot be fetched: a tiny model learns the text that comes with numpy instead"
            preset=tiny; embedded_text; } ;;
esac
case $preset in cpu|tiny|eighth) processes=1 ;; esac  # their steps have few sequences
case ${NPROC:-1} in *[!0-9]*|0*) die "NPROC=$NPROC is no count of processes." ;; esac; processes=${NPROC:-$processes}
say "$machine, processes: $processes, preset: $preset, data: $data"
[ -n "$given_data" ] || set -- "--data_dir=$data" "$@"
[ -n "$given_preset" ] || set -- "--preset=$preset" "$@"
set -- "$script" "$@"
if [ $processes -gt 1 ]; then  # a single process needs no torchrun, which would turn every exit code into 1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS-$((($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes))}"
    set -- -m torch.distributed.run --standalone --nproc_per_node=$processes "$@"
fi
exec "$python" data/then_sample.py "$python" "$@"
