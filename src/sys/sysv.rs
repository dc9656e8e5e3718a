//! System V shared memory segments, semaphore sets and message queues with chosen ids
//! (sysvipc(7)).

use super::huge::size_flag;
use nix::errno::Errno;
use nix::libc;

/// Makes the segment that is to have the id written to `/proc/sys/kernel/shm_next_id` before,
/// of huge pages if they are of so many bytes rather than 0.
///
/// # Errors
/// `EEXIST`: the key is in use; `EINVAL`, `ENOSPC`, `ENOMEM`: a limit of this machine, or not
/// enough huge pages.
pub fn create_segment(key: i32, size: usize, mode: i32, huge_page: u64) -> Result<i32, Errno> {
    let huge = match huge_page {
        0 => 0,
        page => libc::SHM_HUGETLB | size_flag(page).cast_signed(),
    };
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode | huge;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::shmget(key, size, flags) })
}

/// Owner and permission bits (shmctl(2) `IPC_SET`).
///
/// # Errors
/// As the system call.
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut described: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one shmid_ds.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut described) })?;
    described.shm_perm.uid = uid;
    described.shm_perm.gid = gid;
    described.shm_perm.mode = u16::try_from(mode & 0o777).unwrap_or(0);
    // SAFETY: reads one shmid_ds.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut described) }).map(drop)
}

/// Marks a segment to be destroyed when nobody has it attached any more.
///
/// # Errors
/// As shmctl(2) `IPC_RMID`.
pub fn remove_segment(id: i32) -> Result<(), Errno> {
    let null = std::ptr::null_mut();
    // SAFETY: nothing is read or written.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, null) }).map(drop)
}

/// A segment attached to this process.
#[derive(Debug)]
pub struct Attached {
    memory: *mut u8,
    len: usize,
}

impl Attached {
    /// Attaches a segment of `len` bytes (shmat(2)).
    ///
    /// # Errors
    /// `EINVAL`: there is none, or it is smaller.
    pub fn new(id: i32, len: usize) -> Result<Self, Errno> {
        // SAFETY: plain data for which zero is valid; the kernel fills it.
        let mut described: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: writes one shmid_ds.
        Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut described) })?;
        if described.shm_segsz < len {
            return Err(Errno::EINVAL);
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if memory.addr() == usize::MAX {
            return Err(Errno::last());
        }
        Ok(Self {
            memory: memory.cast(),
            len,
        })
    }

    /// Zeroes all of it.
    pub fn clear(&mut self) {
        // SAFETY: `len` bytes are mapped, and no reference to them exists.
        unsafe { std::ptr::write_bytes(self.memory, 0, self.len) };
    }

    /// Copies bytes in; those that do not fit are left out.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let len = bytes.len().min(self.len.saturating_sub(offset));
        if len > 0 {
            // SAFETY: inside of the `len` bytes that are mapped; no reference to them exists.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.add(offset), len) };
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by us; nothing borrowed from it is left.
        unsafe { libc::shmdt(self.memory.cast()) };
    }
}

/// Makes the semaphore set that is to have the id written to `/proc/sys/kernel/sem_next_id`
/// before.
///
/// # Errors
/// `EEXIST`: the key is in use; `EINVAL`, `ENOSPC`: a limit of this machine.
pub fn create_semaphores(key: i32, count: i32, mode: i32) -> Result<i32, Errno> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semget(key, count, flags) })
}

/// Owner and permission bits of a semaphore set (semctl(2) `IPC_SET`).
///
/// # Errors
/// As the system call.
pub fn set_semaphores_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut described: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one semid_ds.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut described) })?;
    described.sem_perm.uid = uid;
    described.sem_perm.gid = gid;
    described.sem_perm.mode = u16::try_from(mode & 0o777).unwrap_or(0);
    // SAFETY: reads one semid_ds.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut described) }).map(drop)
}

/// Removes a semaphore set.
///
/// # Errors
/// As semctl(2) `IPC_RMID`.
pub fn remove_semaphores(id: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// Value of one semaphore of a set (semctl(2) `GETVAL`).
///
/// # Errors
/// `EINVAL`, `EIDRM`: the set is gone.
pub fn semaphore_value(id: i32, number: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, number, libc::GETVAL) })
}

/// Who did the last operation on one semaphore of a set (semctl(2) `GETPID`); 0 = nobody.
///
/// # Errors
/// `EINVAL`, `EIDRM`: the set is gone.
pub fn semaphore_pid(id: i32, number: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::semctl(id, number, libc::GETPID) })
}

/// What the kernel tells of a message queue (msgctl(2) `IPC_STAT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Key; 0 = `IPC_PRIVATE`.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// Owner's user and group.
    pub owner: (u32, u32),
    /// Its creator's effective user and group.
    pub creator: (u32, u32),
    /// Bytes that all messages may have.
    pub qbytes: u64,
    /// Bytes that they have.
    pub cbytes: u64,
    /// Messages.
    pub qnum: u64,
    /// Who sent last; 0 = nobody.
    pub sender: i32,
    /// Who received last; 0 = nobody.
    pub receiver: i32,
    /// Times of the last msgsnd, msgrcv and change.
    pub times: [i64; 3],
}

/// Makes the message queue that is to have the id written to `/proc/sys/kernel/msg_next_id`
/// before.
///
/// # Errors
/// `EEXIST`: the key is in use; `ENOSPC`, `ENOMEM`: a limit of this machine.
pub fn create_queue(key: i32, mode: i32) -> Result<i32, Errno> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::msgget(key, flags) })
}

fn described(id: i32) -> Result<libc::msqid_ds, Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut described: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one msqid_ds.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut described) })?;
    Ok(described)
}

/// Asks for the state of a message queue.
///
/// # Errors
/// `EINVAL`, `EIDRM`: it is gone.
pub fn queue_state(id: i32) -> Result<QueueState, Errno> {
    let found = described(id)?;
    let perm = &found.msg_perm;
    Ok(QueueState {
        key: perm.__key,
        mode: u32::from(perm.mode) & 0o777,
        owner: (perm.uid, perm.gid),
        creator: (perm.cuid, perm.cgid),
        qbytes: found.msg_qbytes,
        cbytes: found.__msg_cbytes,
        qnum: found.msg_qnum,
        sender: found.msg_lspid,
        receiver: found.msg_lrpid,
        times: [found.msg_stime, found.msg_rtime, found.msg_ctime],
    })
}

/// Owner, permission bits and capacity of a message queue (msgctl(2) `IPC_SET`).
///
/// # Errors
/// `EPERM`: more bytes than `kernel.msgmnb`, without `CAP_SYS_RESOURCE`.
pub fn set_queue(id: i32, uid: u32, gid: u32, mode: u32, qbytes: u64) -> Result<(), Errno> {
    let mut described = described(id)?;
    described.msg_perm.uid = uid;
    described.msg_perm.gid = gid;
    described.msg_perm.mode = u16::try_from(mode & 0o777).unwrap_or(0);
    described.msg_qbytes = qbytes;
    // SAFETY: reads one msqid_ds.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut described) }).map(drop)
}

/// Removes a message queue.
///
/// # Errors
/// As msgctl(2) `IPC_RMID`.
pub fn remove_queue(id: i32) -> Result<(), Errno> {
    let null = std::ptr::null_mut();
    // SAFETY: nothing is read or written.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_RMID, null) }).map(drop)
}

/// Bytes of a message's type, which stand before its text.
const MTYPE: usize = size_of::<libc::c_long>();

/// Type and text of the message at `index`, which stays in its queue (msgrcv(2) `MSG_COPY`).
///
/// # Errors
/// `ENOMSG`: there are fewer messages; `E2BIG`: its text is longer than `most`; `EINVAL`: longer
/// than `kernel.msgmax`, or the queue is gone; `ENOSYS`: without `CONFIG_CHECKPOINT_RESTORE`.
pub fn copy_message(id: i32, index: usize, most: usize) -> Result<(i64, Vec<u8>), Errno> {
    let flags = MSG_COPY | libc::IPC_NOWAIT;
    let index = libc::c_long::try_from(index).map_err(|_| Errno::ENOMSG)?;
    let mut message = vec![0_u8; MTYPE + most];
    // SAFETY: writes the type and at most `most` bytes behind it.
    let len = Errno::result(unsafe {
        libc::msgrcv(id, message.as_mut_ptr().cast(), most, index, flags)
    })?;
    let text = message.split_off(MTYPE);
    let mtype = message.try_into().map_or(0, libc::c_long::from_ne_bytes);
    Ok((mtype, text[..usize::try_from(len).unwrap_or(0)].to_vec()))
}

/// Of include/uapi/linux/msg.h.
const MSG_COPY: i32 = 0o40000;

/// Adds a message to a queue that has room for it (msgsnd(2)).
///
/// # Errors
/// `EAGAIN`: there is no room; `EINVAL`: longer than `kernel.msgmax`, or no type above 0.
pub fn send_message(id: i32, mtype: i64, text: &[u8]) -> Result<(), Errno> {
    let message = [&mtype.to_ne_bytes(), text].concat();
    // SAFETY: reads the type and the text behind it.
    Errno::result(unsafe {
        libc::msgsnd(id, message.as_ptr().cast(), text.len(), libc::IPC_NOWAIT)
    })
    .map(drop)
}

/// Takes the first message out of a queue and forgets it.
///
/// # Errors
/// `ENOMSG`: it is empty.
pub fn discard_message(id: i32) -> Result<(), Errno> {
    let flags = libc::MSG_NOERROR | libc::IPC_NOWAIT;
    let mut mtype: libc::c_long = 0;
    // SAFETY: writes the type and nothing behind it.
    Errno::result(unsafe { libc::msgrcv(id, (&raw mut mtype).cast(), 0, 0, flags) }).map(drop)
}
