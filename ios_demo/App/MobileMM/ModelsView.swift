import SwiftUI
import UniformTypeIdentifiers

struct ModelsView: View {
    @Bindable var app: AppModel
    @State private var showsImporter = false
    @State private var address = ""

    var body: some View {
        NavigationStack {
            List {
                Section("On this device") {
                    if app.names.isEmpty { Text("None yet").foregroundStyle(.secondary) }
                    ForEach(app.names, id: \.self) { name in
                        Button {
                            Task { await app.select(name) }
                        } label: {
                            Label(name, systemImage: name == app.selected ? "checkmark.circle.fill" : "circle")
                        }
                        .swipeActions {
                            Button("Delete", systemImage: "trash", role: .destructive) { app.delete(name) }
                        }
                    }
                }
                Section("Add") {
                    Button("From Files", systemImage: "folder") { showsImporter = true }
                    TextField("https://… a bundle's folder", text: $address)
                        .textInputAutocapitalization(.never)
                        .autocorrectionDisabled()
                        .onSubmit { Task { await app.download(address) } }
                    Text("A download that breaks off goes on where it was; every file's hash is checked.")
                        .font(.footnote)
                        .foregroundStyle(.secondary)
                }
                if let busy = app.busy {
                    Section {
                        ProgressView(busy)
                    }
                }
                if let failure = app.failure {
                    Section {
                        Text(failure).foregroundStyle(.red)
                    }
                }
            }
            .disabled(app.busy != nil)
            .navigationTitle("Models")
            .fileImporter(isPresented: $showsImporter, allowedContentTypes: [.folder, .zip]) { result in
                switch result {
                case .success(let source): Task { await app.add(source) }
                case .failure(let error): app.failure = error.localizedDescription
                }
            }
        }
    }
}
