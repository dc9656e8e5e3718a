//! Which programs hook what, and which of them the kernel must take.

use libbpf_rs::btf::{Btf, BtfType, types};

/// What a program hooks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// A BTF tracepoint; which of several layouts, by its number of arguments.
    Tracepoint(&'static str, Option<usize>),
    /// A kernel function.
    Function(&'static str),
}

/// When a program is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    Always,
    /// With the fentry set.
    Fentry,
    /// With the fallback set.
    Fallback,
    /// With the fallback set, or if one of [`MAPPINGS`] is not there.
    Mappings,
}

use Target::{Function, Tracepoint};
use When::{Always, Fallback, Fentry, Mappings};

pub(super) const PROGRAMS: &[(&str, Target, When)] = &[
    ("task_newtask", Tracepoint("task_newtask", None), Always),
    ("task_exec", Tracepoint("sched_process_exec", None), Always),
    ("task_rename", Tracepoint("task_rename", None), Always),
    ("task_exit", Tracepoint("sched_process_exit", None), Always),
    ("task_free", Tracepoint("sched_process_free", None), Always),
    ("cgroup_mkdir", Tracepoint("cgroup_mkdir", None), Always),
    (
        "cgroup_attach",
        Tracepoint("cgroup_attach_task", None),
        Always,
    ),
    (
        "inet_sock_set_state",
        Tracepoint("inet_sock_set_state", None),
        Always,
    ),
    (
        "inet_sock_set_state_stand_in",
        Tracepoint("inet_sock_set_state", None),
        Always,
    ),
    (
        "mmap_lock_path",
        Tracepoint("mmap_lock_acquire_returned", Some(4)),
        Mappings,
    ),
    (
        "mmap_lock",
        Tracepoint("mmap_lock_acquire_returned", Some(3)),
        Mappings,
    ),
    ("mmap_region", Function("mmap_region"), Fentry),
    ("do_mas_munmap", Function("do_mas_munmap"), Fentry),
    ("do_vmi_munmap", Function("do_vmi_munmap"), Fentry),
    (
        "do_vmi_align_munmap",
        Function("do_vmi_align_munmap"),
        Fentry,
    ),
    ("mprotect_fixup", Function("mprotect_fixup"), Fentry),
    ("do_brk_flags", Function("do_brk_flags"), Fentry),
    ("sys_brk", Function("__x64_sys_brk"), Fentry),
    ("sys_mremap", Function("__x64_sys_mremap"), Fentry),
    ("do_madvise", Function("do_madvise"), Fentry),
    ("mlock_fixup", Function("mlock_fixup"), Fentry),
    ("mbind_range", Function("mbind_range"), Fentry),
    ("ksys_shmdt", Function("ksys_shmdt"), Fentry),
    ("userfaultfd_ioctl", Function("userfaultfd_ioctl"), Fentry),
    ("do_mseal", Function("do_mseal"), Fentry),
    ("sys_prctl", Function("__x64_sys_prctl"), Fentry),
    ("expand_downwards", Function("expand_downwards"), Fentry),
    ("sys_exit", Tracepoint("sys_exit", None), Fallback),
    ("task_release", Function("release_task"), Fentry),
    ("unshare_files", Function("unshare_files"), Fentry),
    ("ksys_unshare", Function("ksys_unshare"), Fentry),
    ("fd_install", Function("fd_install"), Fentry),
    ("pick_file", Function("pick_file"), Fentry),
    (
        "file_close_fd_locked",
        Function("file_close_fd_locked"),
        Fentry,
    ),
    ("do_dup2", Function("do_dup2"), Fentry),
    ("do_dup2_exit", Function("do_dup2"), Fentry),
    ("set_close_on_exec", Function("set_close_on_exec"), Fentry),
    ("do_close_on_exec", Function("do_close_on_exec"), Fentry),
    ("close_range_exit", Function("__close_range"), Fentry),
    ("dup_fd_enter", Function("dup_fd"), Fentry),
    ("dup_fd", Function("dup_fd"), Fentry),
    ("exit_files", Function("exit_files"), Fentry),
    ("fcntl", Function("do_fcntl"), Fentry),
    ("vfs_ioctl", Function("do_vfs_ioctl"), Fentry),
    ("f_setown", Function("__f_setown"), Fentry),
    ("commit_creds", Function("commit_creds"), Fentry),
    ("set_fs_pwd", Function("set_fs_pwd"), Fentry),
    ("set_fs_root", Function("set_fs_root"), Fentry),
    ("sys_umask", Function("__x64_sys_umask"), Fentry),
    ("change_pid", Function("change_pid"), Fentry),
    ("unix_release", Function("unix_release_sock"), Fentry),
    ("watch_set", Function("inotify_update_watch"), Fentry),
    (
        "watch_removed",
        Function("inotify_ignored_and_remove_idr"),
        Fentry,
    ),
    ("sys_setsockopt", Function("__sys_setsockopt"), Fentry),
    ("sys_bind", Function("__sys_bind"), Fentry),
    ("sys_listen", Function("__sys_listen"), Fentry),
    ("sys_connect", Function("__sys_connect_file"), Fentry),
    ("inet_bound", Function("inet_autobind"), Fentry),
    ("unix_bound", Function("unix_autobind"), Fentry),
    ("sys_shutdown", Function("__sys_shutdown"), Fentry),
    ("epoll_ctl", Function("do_epoll_ctl"), Fentry),
    ("epoll_ctl_exit", Function("do_epoll_ctl"), Fentry),
    ("epoll_insert", Function("ep_ptable_queue_proc"), Fentry),
    ("epoll_remove_item", Function("ep_remove_epi"), Fentry),
    ("epoll_remove_forced", Function("__ep_remove"), Fentry),
    ("epoll_remove", Function("ep_remove"), Fentry),
];

/// Programs that say the same: only the first one the kernel has is loaded.
pub(super) const INSTEAD: &[&[&str]] =
    &[&["epoll_remove_item", "epoll_remove_forced", "epoll_remove"]];

/// Without one of each of these groups the fentry set is not exact, and is not used.
pub(super) const NEEDED: &[&[&str]] = &[
    &["cgroup_mkdir"],
    &["fd_install"],
    &["pick_file", "file_close_fd_locked"],
    &["do_dup2"],
    &["set_close_on_exec"],
    &["do_close_on_exec"],
    &["close_range_exit"],
    &["dup_fd_enter"],
    &["dup_fd"],
    &["unshare_files"],
    &["ksys_unshare"],
    &["epoll_ctl"],
    &["epoll_ctl_exit"],
    &["epoll_insert"],
    INSTEAD[0],
    &["exit_files"],
    &["fcntl"],
    &["vfs_ioctl"],
    &["f_setown"],
    &["commit_creds"],
    &["set_fs_pwd"],
    &["set_fs_root"],
    &["sys_umask"],
    &["change_pid"],
    &["unix_release"],
    &["watch_set"],
    &["watch_removed"],
    &["sys_bind"],
    &["sys_listen"],
    &["sys_connect"],
    &["sys_shutdown"],
    &["sys_setsockopt"],
];

/// Together these mark every change of mappings; else the tracepoint of `mmap_lock` does.
pub(super) const MAPPINGS: &[&[&str]] = &[
    &["mmap_region"],
    &["do_mas_munmap", "do_vmi_align_munmap"],
    &["mprotect_fixup"],
    &["do_brk_flags"],
    &["sys_brk"],
    &["sys_mremap"],
    &["do_madvise"],
    &["mlock_fixup"],
    &["mbind_range"],
    &["ksys_shmdt"],
    &["userfaultfd_ioctl"],
    &["sys_prctl"],
    &["expand_downwards"],
];

/// The kernel functions that programs hook.
pub(super) fn all_functions() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().filter_map(|(_, target, _)| match target {
        Function(name) => Some(*name),
        Tracepoint(..) => None,
    })
}

/// Whether the kernel has one function of each group, by the names of their programs.
pub(super) fn functions(btf: &Btf<'_>, groups: &[&[&str]]) -> bool {
    let target = |name: &str| PROGRAMS.iter().find(|(program, _, _)| *program == name);
    let there = |name: &&str| target(name).is_some_and(|(_, target, _)| exists(btf, *target));
    groups.iter().all(|group| group.iter().any(there))
}

pub(super) fn exists(btf: &Btf<'_>, target: Target) -> bool {
    match target {
        Function(name) => btf.type_by_name::<types::Func<'_>>(name).is_some(),
        Tracepoint(name, arguments) => {
            let Some(typedef) = btf.type_by_name::<BtfType<'_>>(&format!("btf_trace_{name}"))
            else {
                return false;
            };
            let Some(wanted) = arguments else { return true };
            // typedef -> pointer -> prototype, whose first parameter is not the tracepoint's
            let pointer = typedef.next_type();
            let prototype = pointer.and_then(|pointer| pointer.next_type());
            let prototype = prototype.and_then(|ty| types::FuncProto::try_from(ty).ok());
            prototype.is_some_and(|prototype| prototype.len() == wanted + 1)
        }
    }
}
