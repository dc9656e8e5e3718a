//! Settings below /proc/sys that restored applications rely on.

use std::fs;
use std::path::Path;

/// What is carried over: limits that restored objects may exceed otherwise, and TCP's
/// behaviour as the peers of restored connections know it.
const CARRIED: [&str; 39] = [
    "fs/aio-max-nr",
    "fs/file-max",
    "fs/nr_open",
    "fs/pipe-max-size",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/pid_max",
    "kernel/threads-max",
    "net/core/rmem_default",
    "net/core/rmem_max",
    "net/core/somaxconn",
    "net/core/wmem_default",
    "net/core/wmem_max",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/tcp_ecn",
    "net/ipv4/tcp_fin_timeout",
    "net/ipv4/tcp_keepalive_intvl",
    "net/ipv4/tcp_keepalive_probes",
    "net/ipv4/tcp_keepalive_time",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv4/tcp_mtu_probing",
    "net/ipv4/tcp_retries1",
    "net/ipv4/tcp_retries2",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_sack",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/tcp_timestamps",
    "net/ipv4/tcp_window_scaling",
    "net/ipv4/tcp_wmem",
    "net/ipv6/bindv6only",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/ip_nonlocal_bind",
    "vm/max_map_count",
    "vm/overcommit_memory",
];

/// Reads those that the running kernel has.
#[must_use]
pub fn collect(root: &Path) -> Vec<(String, String)> {
    CARRIED
        .iter()
        .filter_map(|name| {
            let value = fs::read_to_string(root.join(name)).ok()?;
            Some(((*name).to_owned(), value.trim().to_owned()))
        })
        .collect()
}

/// Sets those that differ; the ones that could not be set are returned with the reason.
#[must_use]
pub fn apply(root: &Path, settings: &[(String, String)]) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, value) in settings {
        // An image names what this kernel may set, and nothing outside of /proc/sys.
        if !CARRIED.contains(&name.as_str()) {
            failures.push(format!("sysctl {name} is not one that is carried"));
            continue;
        }
        let path = root.join(name);
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
            continue;
        }
        if let Err(error) = fs::write(&path, value) {
            failures.push(format!("write {}: {error}", path.display()));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_back() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&old, &new] {
            fs::create_dir_all(dir.path().join("net/ipv4")).unwrap();
        }
        let range = "net/ipv4/ip_local_port_range";
        fs::write(old.path().join(range), "1024\t2000\n").unwrap();
        fs::write(new.path().join(range), "32768\t60999\n").unwrap();
        let mut settings = collect(old.path());
        assert_eq!(settings, [(range.to_owned(), "1024\t2000".to_owned())]);
        settings.push(("../etc/passwd".into(), "x".into()));
        assert_eq!(apply(new.path(), &settings).len(), 1);
        assert_eq!(
            fs::read_to_string(new.path().join(range)).unwrap(),
            "1024\t2000"
        );
        assert!(!old.path().join("../etc/passwd").exists());
    }

    #[test]
    fn the_list_has_no_doubles() {
        let mut sorted = CARRIED.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted, CARRIED);
    }
}
