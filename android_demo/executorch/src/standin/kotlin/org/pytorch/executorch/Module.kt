package org.pytorch.executorch

import java.io.Closeable
import java.io.File
import java.util.concurrent.locks.ReentrantLock

/** A program, in the process of [PythonRuntime]. Its methods are loaded when they are first called. */
open class Module private constructor(path: String, numThreads: Int) : Closeable {
    private val lock = ReentrantLock()
    private var program: PythonRuntime.Program? = PythonRuntime.load(path, numThreads)

    open fun execute(methodName: String, vararg inputs: EValue): Array<EValue> = locked { it.execute(methodName, inputs.map { one -> one.toTensor() }) }

    open fun loadMethod(methodName: String) =
        locked { if (methodName !in it.methods) throw ExecutorchRuntimeException(0x12, "Failed to load method: $methodName") }

    open fun getMethods(): Array<String> = locked { it.methods.toTypedArray() }

    override fun close() {
        check(lock.tryLock()) { "Cannot destroy module while method is executing" }
        try {
            program?.close()
            program = null
        } finally {
            lock.unlock()
        }
    }

    private fun <T> locked(action: (PythonRuntime.Program) -> T): T {
        lock.lock()
        try {
            return action(checkNotNull(program) { "Module has been destroyed" })
        } finally {
            lock.unlock()
        }
    }

    companion object {
        const val LOAD_MODE_FILE = 0

        const val LOAD_MODE_MMAP = 1

        @JvmStatic
        @JvmOverloads
        fun load(modelPath: String?, loadMode: Int = LOAD_MODE_FILE, numThreads: Int = 0): Module {
            require(modelPath != null && File(modelPath).isFile) { "Cannot load model path: path does not exist: $modelPath" }
            require(loadMode in LOAD_MODE_FILE..LOAD_MODE_MMAP) { "load mode $loadMode" }
            return Module(modelPath, numThreads)
        }
    }
}
