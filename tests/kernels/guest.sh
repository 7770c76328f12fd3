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
    awk '/^passed +/ && !seen[$2]++ { engines = engines ", " $2 } { last = $0 }
        /^unavailable/ || /^failed/ { why = $0 }
        match($0, /windows need Linux [0-9.]+ or later/) { needs = substr($0, RSTART, RLENGTH) }
        END { print engines ? substr(engines, 3) : needs ? needs : why ? why : last }'
}

as_nobody() {
    env HOME=/scratch "$1" -c "import os, sys
os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])" "$2" "$3" "$4"
}

ran() {
    # The interpreter may be root's own; the guest's changes to folders are lost with it.
    chmod 711 /root
    step selftest-root .venv/bin/fremap selftest
    [ "$code" = 0 ] || return # no engine works: the tests have nothing to run on
    # Emulated, the thread that trims gets too little of the processors to keep memory flat.
    step tests-root .venv/bin/pytest -q -p no:cacheprovider --timeout 300 --examples 4 \
        -k "not leaves_memory_flat" \
        tests/origin tests/unit/test_window.py tests/unit/test_rows.py tests/unit/test_memmap.py
    step selftest-user as_nobody .venv/bin/python -m fremap selftest
    step tests-user .venv/bin/python tests/runners/as_ordinary_user.py -q -p no:cacheprovider \
        --timeout 300 --examples 4 tests/origin tests/unit/test_window.py
}

if [ "$1" = selftest-alone ]; then
    step selftest-root "$PYTHON" -m fremap selftest
    step selftest-user as_nobody "$PYTHON" -m fremap selftest
else
    ran
fi
echo "guest: done"
