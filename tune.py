import os, subprocess, sys, itertools
sys.path.insert(0,'tools')
import gpu_check as g, torch
torch.manual_seed(0)
from pathlib import Path
OUT=os.environ['OUT']
variants=[(16,2),(16,4)]
procs=[]
for m,a in variants:
    lib=f'/tmp/lib_{m}_{a}.so'
    procs.append(subprocess.Popen(['nvcc','-std=c++17','-O3','-Xcompiler','-fPIC','-cudart','static','-shared','-gencode','arch=compute_90,code=sm_90','-DTUNE',f'-DTUNE_MAX={m}',f'-DTUNE_AHEAD={a}','-Icsrc/include','-o',lib,'csrc/kernels/cuda/wkv.cu','csrc/kernels/cuda/product.cu']))
assert all(p.wait()==0 for p in procs)
report=g.Report(Path(OUT)/'x.json')
layout=g._layout()
def speeds_for(lib):
    k=g.Kernels(torch,Path(lib),'cuda'); c=g.Checks(k,report,layout); return k,c
k0,c0=speeds_for('/tmp/lib_16_2.so')
c0.wkv6(); c0.wkv4(); c0.product(); print('checks', report.passed, len(report.checks), [x for x in report.checks if x['status']!='passed'][:3])
S=g.Speeds(c0,True)
print('peak',S.peak/1e9)
S.recurrences('1.5B',(1,))
ks={}
for m,a in variants: ks[(m,a)]=g.Kernels(torch,Path(f'/tmp/lib_{m}_{a}.so'),'cuda')
for D in (2048,2560):
  for bits,group in ((4,32),(4,128),(8,32)):
    for name,(n_in,n_out) in {'DxD':(D,D),'key':(D,4*D),'value':(4*D,D),'head':(D,65536)}.items():
        padded=layout.padded_inputs(n_in); size=n_out*(padded*bits//8+2*padded//group)
        count=max(4,min(400,-(-S.at_least_bytes//size)))
        W=[torch.randint(0,256,(n_out,padded*bits//8),device='cuda',dtype=torch.uint8) for _ in range(count)]
        SC=[torch.rand(n_out,padded//group,device='cuda').half() for _ in range(count)]
        x=torch.randn(1,n_in,device='cuda').half(); y=torch.empty(1,n_out,device='cuda').half()
        copy=size/S.copy_bandwidth(size,count)
        out=[]
        for (m,a),k in ks.items():
            for sp,w in ((0,4),(0,8),(1,4),(1,8),(2,4),(2,8),(3,8),(4,16)):
                if (1<<sp)>padded*bits//512: continue
                os.environ['TUNE_WARPS']=str(w); os.environ['TUNE_SPLIT']=str(sp)
                t=g.replay_time_s(torch,[lambda W_=W_,S_=S_: k.product(1,bits,group,n_out,x,W_,S_,y) for W_,S_ in zip(W,SC)],5)/count
                out.append((t,sp,a,w))
        for kk in ('TUNE_WARPS','TUNE_SPLIT'): os.environ.pop(kk,None)
        for (m,a),k in ks.items():
            t=g.replay_time_s(torch,[lambda W_=W_,S_=S_: k.product(1,bits,group,n_out,x,W_,S_,y) for W_,S_ in zip(W,SC)],5)/count
            out.append((t,'def',a,0))
        x8=torch.randn(8,n_in,device='cuda').half(); y8=torch.empty(8,n_out,device='cuda').half()
        t8=g.replay_time_s(torch,[lambda W_=W_,S_=S_: ks[(16,2)].product(1,bits,group,n_out,x8,W_,S_,y8) for W_,S_ in zip(W,SC)],5)/count
        out.sort()
        print(f'D{D} int{bits} g{group} {name:6} {size/1e6:6.1f}MB copy {copy*1e6:6.2f}us |', ' '.join(f'{t*1e6:.2f}(s{m},a{a},w{w}:{copy/t:.0%})' for t,m,a,w in out[:6]),f'| defaults a2',f'{[t for t,m,a,w in out if m=="def" and a==2][0]*1e6:.2f} rows8 {t8*1e6:.2f}',flush=True)
        del W,SC
