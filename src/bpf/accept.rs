//! Connections that a listener has not accepted, made without a handshake.
//!
//! A program on the ingress of the loopback interface vouches for the packet that ends a handshake,
//! as the kernel does for one with a SYN cookie (`bpf_sk_assign_tcp_reqsk`, Linux 6.9): both ends'
//! sequence numbers are those in the packet, what was agreed on is what user space says.

use super::netlock::octets;
use super::pass;
use super::programs::Programs;
/// What was agreed on in a handshake: `struct bpf_tcp_req_attrs` of the kernel.
pub use super::skeleton::accept::types::handshake as Handshake;
use super::skeleton::accept::types::{seen, sought};
use super::skeleton::accept::{AcceptSkel, AcceptSkelBuilder};
use crate::sys::socket::{SocketError, int_option, set_int_option};
use crate::sys::tcp::state::LISTEN;
use libbpf_rs::btf::{Btf, types};
use libbpf_rs::libbpf_sys;
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, ProgramInput};
use nix::libc;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The function of the kernel that all depends on.
const FUNCTION: &str = "bpf_sk_assign_tcp_reqsk";

/// `LOOPBACK_IFINDEX` of include/net/flow.h, the same in all network namespaces.
pub const LOOPBACK: u32 = 1;

/// No socket was found; `LISTEN`: none that is connected.
const NONE: u8 = 0;

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The program did not load.
    #[error(
        "Loading the BPF program that makes connections to accept failed at {step}; it needs Linux 6.9 with CONFIG_SYN_COOKIES, and CAP_BPF with CAP_NET_ADMIN, or root"
    )]
    Load {
        /// What was being done.
        step: &'static str,
        /// From libbpf.
        source: libbpf_rs::Error,
    },
    /// The kernel refused to attach it.
    #[error("Attaching a BPF program to the loopback interface failed")]
    Attach(#[source] io::Error),
    /// The listener was not taken.
    #[error("Adding the listener to a BPF map failed; is another sockmap using it?")]
    Listener(#[source] libbpf_rs::Error),
    /// The listener's group could not be told whom to choose.
    #[error("Choosing one of the listeners that share a port failed")]
    Choice(#[source] SocketError),
    /// A connection could not be looked at.
    #[error("Running a BPF program that looks at a connection failed")]
    Look(#[source] libbpf_rs::Error),
    /// No packet came by.
    #[error("The packet did not come over the loopback interface; is it up?")]
    NoPacket,
    /// The kernel did not take what was agreed on.
    #[error(
        "bpf_sk_assign_tcp_reqsk failed; are net.ipv4.tcp_timestamps, tcp_sack and tcp_window_scaling as before?"
    )]
    Refused(#[source] io::Error),
}

/// What a connection that nobody has accepted has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// `TCP_*` of include/net/tcp_states.h.
    pub state: u8,
    /// Bytes that nobody has read; a FIN counts as one.
    pub unread: u32,
}

/// The program, attached. Dropping it detaches it.
pub struct Handshakes {
    skel: AcceptSkel<'static>,
    _link: OwnedFd,
}

impl std::fmt::Debug for Handshakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshakes").finish_non_exhaustive()
    }
}

impl Handshakes {
    /// Whether this kernel has what it takes.
    #[must_use]
    pub fn are_supported() -> bool {
        let is_it = |func: types::Func<'_>| func.name().is_some_and(|name| name == FUNCTION);
        Btf::from_vmlinux().is_ok_and(|btf| btf.type_by_kind::<types::Func<'_>>().any(is_it))
    }

    /// Loads the programs and attaches them to the loopback interface.
    ///
    /// # Errors
    /// [`HandshakeError::Load`], [`HandshakeError::Attach`].
    pub fn attach() -> Result<Self, HandshakeError> {
        let at = |step| move |source| HandshakeError::Load { step, source };
        super::redirect_libbpf_log();
        // See Instance::load for why the storage is left behind.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = AcceptSkelBuilder::default()
            .open(storage)
            .map_err(at("open"))?;
        let skel = open.load().map_err(at("load"))?;
        let link = attach(skel.progs.vouch.as_fd(), LOOPBACK).map_err(HandshakeError::Attach)?;
        Ok(Self { skel, _link: link })
    }

    /// The loaded programs.
    ///
    /// # Errors
    /// This process has no descriptors left.
    pub fn programs(&self) -> io::Result<Programs> {
        Programs::of(self.skel.object())
    }

    /// The connection with these ends, of one family; no descriptor need lead to it.
    ///
    /// # Errors
    /// [`HandshakeError::Look`].
    pub fn look(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Option<Received>, HandshakeError> {
        if let Some(vars) = self.skel.maps.bss_data.as_deref_mut() {
            vars.sought = sought(local, remote);
            vars.seen = seen::default();
        }
        // As long as the shortest packet that bpf(2) takes.
        let input = ProgramInput {
            data_in: Some(&[0; 64]),
            ..ProgramInput::default()
        };
        self.skel
            .progs
            .look
            .test_run(input)
            .map_err(HandshakeError::Look)?;
        let seen = self.skel.maps.bss_data.as_deref().map(|vars| vars.seen);
        let seen = seen.filter(|seen| ![NONE, LISTEN].contains(&seen.state));
        Ok(seen.map(|seen| Received {
            state: seen.state,
            unread: seen.unread,
        }))
    }

    /// Has the listener take the packet that `send` sends as the end of a handshake of these two
    /// ends, which are of one family.
    ///
    /// # Errors
    /// All but [`HandshakeError::Load`] and [`HandshakeError::Attach`]; that of `send`.
    pub fn end<E: From<HandshakeError>>(
        &mut self,
        listener: BorrowedFd<'_>,
        (local, remote): (SocketAddr, SocketAddr),
        agreed: Handshake,
        send: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let key = 0_u32.to_ne_bytes();
        let fd = u64::try_from(listener.as_raw_fd()).unwrap_or(u64::MAX);
        let map = &self.skel.maps.listener;
        map.update(&key, &fd.to_ne_bytes(), MapFlags::ANY)
            .map_err(HandshakeError::Listener)?;
        if let Some(vars) = self.skel.maps.bss_data.as_deref_mut() {
            vars.sought = sought(local, remote);
            vars.handshake = agreed;
            vars.result = 0;
            vars.expected = 1;
        }
        let choice = self.skel.progs.choose.as_fd().as_raw_fd();
        let shares = int_option(listener, libc::SOL_SOCKET, libc::SO_REUSEPORT)
            .map_err(HandshakeError::Choice)?
            != 0;
        if shares {
            let option = libc::SO_ATTACH_REUSEPORT_EBPF;
            set_int_option(listener, libc::SOL_SOCKET, option, choice)
                .map_err(HandshakeError::Choice)?;
        }
        let sent = send();
        // Whatever came of it, the socket is to be as it was.
        let taken_out = self.skel.maps.listener.delete(&key);
        if shares {
            let option = libc::SO_DETACH_REUSEPORT_BPF;
            set_int_option(listener, libc::SOL_SOCKET, option, 0)
                .map_err(HandshakeError::Choice)?;
        }
        taken_out.map_err(HandshakeError::Listener)?;
        let vars = self.skel.maps.bss_data.as_deref_mut();
        match vars.map(|vars| (std::mem::take(&mut vars.expected), vars.result)) {
            Some((0, 0)) => sent,
            Some((0, error)) => {
                Err(HandshakeError::Refused(io::Error::from_raw_os_error(-error)).into())
            }
            _ => sent.and(Err(HandshakeError::NoPacket.into())),
        }
    }
}

/// The ends as `look` of accept.bpf.c has them: both are of one family.
fn sought(local: SocketAddr, remote: SocketAddr) -> sought {
    sought {
        local: octets(local.ip()),
        remote: octets(remote.ip()),
        local_port: local.port().to_be(),
        remote_port: remote.port().to_be(),
        v6: u32::from(local.is_ipv6()),
    }
}

/// `BPF_LINK_CREATE` of a program that sees what comes in by an interface, after all others.
fn attach(program: BorrowedFd<'_>, interface: u32) -> io::Result<OwnedFd> {
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: the options outlive the call.
    let fd = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            interface.cast_signed(),
            libbpf_sys::BPF_TCX_INGRESS,
            &raw const options,
        )
    };
    pass::own(fd)
}
