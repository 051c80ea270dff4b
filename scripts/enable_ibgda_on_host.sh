#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares a host for IBGDA (InfiniBand GPUDirect Async): sets two options of the NVIDIA kernel module. See docs/ibgda.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: enable_ibgda_on_host.sh [--apply | --remove] [--root DIR]

Without --apply or --remove it only says what is set, and what --apply would change.

  --apply     write /etc/modprobe.d/magi-ibgda.conf and rebuild the initramfs; needs root. Takes effect at the next boot
  --remove    undo that
  --root DIR  work on the system installed below DIR, such as an image, instead of the running one
TEXT
}

readonly OPTIONS='options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;"'
mode=show root=""
while [ $# -gt 0 ]; do
    case $1 in
        --apply) mode=apply ;;
        --remove) mode=remove ;;
        --root) root=${2:?--root needs a folder}; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
readonly mode root folder=$root/etc/modprobe.d
readonly file=$folder/magi-ibgda.conf

fail() {
    echo "error: $*" >&2
    exit 1
}

# The host's kernel module is what has to change; a container has none of its own.
in_container() {
    [ -e /.dockerenv ] || [ -e /run/.containerenv ] || [ -n "${container:-}" ] ||
        { command -v systemd-detect-virt > /dev/null && systemd-detect-virt --quiet --container; } ||
        grep -qE '(docker|containerd|kubepods|lxc)' /proc/1/cgroup 2> /dev/null
}

# Other files that set the same options: the module would take one of them, and not necessarily ours.
others() {
    local each
    for each in "$root"/{etc,run,usr/local/lib,usr/lib}/modprobe.d/*.conf; do
        [ -r "$each" ] && [ "$each" != "$file" ] || continue
        # A line that ends in a backslash goes on in the next one. All is read, as a pipe that breaks would be an error.
        sed -e ':joined' -e '/\\$/ { N; s/\\\n/ /; b joined' -e '}' "$each" |
            grep -E '^[[:space:]]*options[[:space:]]+nvidia[[:space:]].*NVreg_(EnableStreamMemOPs|RegistryDwords)' \
                > /dev/null || continue
        echo "$each"
    done
}

is_written() { [ -f "$file" ] && [ "$(grep -v '^#' "$file")" = "$OPTIONS" ]; }

show() {
    echo "$file: $(is_written && echo 'written' || echo 'not written')"
    others | sed 's/$/ sets the same options/'
    [ -z "$root" ] || return 0
    local parameters=/proc/driver/nvidia/params
    if [ -r $parameters ]; then
        echo "the running module: $(grep -E '^(EnableStreamMemOPs|RegistryDwords):' $parameters | paste -sd' ')"
    else
        echo "the running module: none is loaded"
    fi
    local adapters=(/sys/class/infiniband/mlx5_*)
    [ -e "${adapters[0]}" ] && echo "adapters: ${adapters[*]##*/}" || echo "adapters: no mlx5 adapter found"
    lsmod 2> /dev/null | grep -q '^nvidia_peermem' && echo "nvidia_peermem: loaded" ||
        echo "nvidia_peermem: not loaded (needed where the kernel has no DMA-BUF support)"
}

rebuild_by() {
    "$@" || fail "the initramfs is still the old one: put right what stands above, then run $*"
}

rebuild_initramfs() {
    if [ -n "$root" ]; then
        echo "rebuild the initramfs of $root yourself"
    elif command -v update-initramfs > /dev/null; then
        rebuild_by update-initramfs -u
    elif command -v dracut > /dev/null; then
        rebuild_by dracut --force
    else
        echo "neither update-initramfs nor dracut is here: rebuild the initramfs yourself"
    fi
    echo "reboot for the module to take its options; then run this again to see them"
}

check_may_change() {
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "--$mode needs root"
    [ -d "$folder" ] || fail "$folder is not there"
}

[ -n "$root" ] || ! in_container || fail "this is a container: run it on the host, whose kernel module it is about"
case $mode in
    show)
        show
        if [ -n "$(others)" ]; then
            echo "--apply would refuse: join them by hand, one line for the module"
        elif [ ! -d "$folder" ]; then
            echo "--apply would refuse: $folder is not there"
        elif ! is_written; then
            printf 'would write to it: %s\n(with --apply, as root)\n' "$OPTIONS"
        fi
        ;;
    apply)
        check_may_change
        [ -z "$(others)" ] || fail "$(others | paste -sd' ') sets the same options: join them by hand, one line for the module"
        if is_written; then
            echo "$file is as it should be: nothing to do"
            exit 0
        fi
        printf '# Written by enable_ibgda_on_host.sh: a GPU may post network transfers by itself (IBGDA).\n%s\n' \
            "$OPTIONS" > "$file.new"
        mv "$file.new" "$file"
        echo "wrote $file"
        rebuild_initramfs
        ;;
    remove)
        check_may_change
        if [ ! -e "$file" ]; then
            echo "$file is not there: nothing to do"
            exit 0
        fi
        rm "$file"
        echo "removed $file"
        rebuild_initramfs
        ;;
esac
