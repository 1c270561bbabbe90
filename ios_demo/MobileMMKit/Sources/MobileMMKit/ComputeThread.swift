import Dispatch

/// A thread of an actor's own: what computes for seconds must hold up neither the screen nor Swift's few shared threads.
final class ComputeThread: SerialExecutor {
    private let queue = DispatchQueue(label: "org.mobilemm.compute", qos: .userInitiated)

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        queue.async { job.runSynchronously(on: self.asUnownedSerialExecutor()) }
    }
}
