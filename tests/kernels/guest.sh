# What runs on each kernel (see boot.py): a step's name, its exit code and its last line are shown.
step() {
    name=$1
    shift
    "$@" >/scratch/said 2>&1
    code=$?
    [ "$code" = 0 ] || tail -n 30 /scratch/said
    echo "guest: $name rc=$code $(summary </scratch/said)"
}

# Of the self-test the engines that passed, or why there is none; of pytest its last line.
summary() {
    awk '/^passed +/ { engines = engines " " $2 "/" $3 } { last = $0 }
        /^unavailable/ || /^failed/ { why = $0 }
        match($0, /windows need Linux [0-9.]+ or later/) { needs = substr($0, RSTART, RLENGTH) }
        END { print engines ? substr(engines, 2) : needs ? needs : why ? why : last }'
}

ran() {
    step selftest-root .venv/bin/fremap selftest
    [ "$code" = 0 ] || return # no engine works: the tests have nothing to run on
    # Emulated, the thread that trims gets too little of the processors to keep memory flat.
    step tests-root .venv/bin/pytest -q -p no:cacheprovider --timeout 300 --examples 4 \
        -k "not leaves_memory_flat" \
        tests/origin tests/unit/test_window.py tests/unit/test_rows.py tests/unit/test_memmap.py
    step selftest-user setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/scratch \
        .venv/bin/fremap selftest
    step tests-user .venv/bin/python tests/runners/as_ordinary_user.py -q -p no:cacheprovider \
        --timeout 300 --examples 4 tests/origin tests/unit/test_window.py
}

if [ "$1" = selftest-alone ]; then
    step selftest-root "$PYTHON" -m fremap selftest
    step selftest-user setpriv --reuid 65534 --regid 65534 --clear-groups \
        "$PYTHON" -m fremap selftest
else
    ran
fi
echo "guest: done"
